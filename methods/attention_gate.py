"""Attention-Gate: small trained modules that tell, before attention, whose K and V to keep.

Before each layer's attention a reduced causal attention over the layer's input gathers context, and
gives every token one number per KV head: keep it or not. Other tokens do not see one that is not
kept, and nothing of it is cached. ``gate_weights`` has the modules, ``cluster.gate_tuning`` trains
them.

Legend: L layers, H KV heads, n tokens, E model width.

Source:
    Attention-Gate, arXiv:2410.12876. It leaves the module's sizes open; n' = 2 heads of d' = 16,
    and a context of one block, are ours.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvstrata.methods.stage import Stage
from kvstrata.protos.errors import LimitError

LossForm = Literal["hinge", "linear", "absolute"]
LOSS_FORMS: tuple[LossForm, ...] = ("hinge", "linear", "absolute")


@dataclass(frozen=True, slots=True)
class AttentionGate(Stage):
    """Keep flags of a prompt's tokens, per layer and KV head.

    It acts on prompts; generated tokens are kept, unless ``H2O`` is behind it.

    Attributes:
        gates: Hash of the trained gates; empty: the newest ones of the served model.
        whole_prompt: Whether these gates look at all of the prompt; a property of theirs, filled in
            with their hash.
        tau: A token is kept if its gate is above. Below 0 keeps all, 1 none but the protected.
        keep_first: So many first tokens are kept whatever their gate says: the sinks.
        keep_last: So many last tokens of the prompt, likewise.
    """

    gates: str = ""
    tau: float = 0.5
    keep_first: int = 1
    keep_last: int = 1
    whole_prompt: bool = False

    name: ClassVar[str] = "attention_gate"
    paper: ClassVar[str] = "arXiv:2410.12876"
    changes_blocks: ClassVar[bool] = True

    @property
    def needs_whole_prompt(self) -> bool:
        """Return whether flags depend on the prompt beyond a token's block."""
        return self.whole_prompt

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise LimitError(
                f"attention_gate.tau must be from -1 (keep all) to 1, not {self.tau}",
                "0.5 is usual",
            )
        if self.keep_first < 0 or self.keep_last < 0:
            raise LimitError(
                "attention_gate.keep_first and keep_last must not be negative", "1 is usual"
            )

    @classmethod
    def neutral(cls) -> Self:
        """Return a threshold that every gate exceeds."""
        return cls(tau=-1.0)

    def flags(
        self, gate: torch.Tensor, first_position: int = 0, num_prompt: int | None = None
    ) -> torch.Tensor:
        """Return which tokens are kept, bool (H, n).

        Args:
            gate: float32 (n, H), 0 to 1.
            first_position: Of the first of these tokens.
            num_prompt: Tokens of the whole prompt; None where its end is not among these.
        """
        kept = (gate > self.tau).T.clone()
        positions = first_position + torch.arange(kept.shape[1], device=kept.device)
        kept[:, positions < self.keep_first] = True
        if num_prompt is not None:
            kept[:, positions >= num_prompt - self.keep_last] = True
        return kept


def straight_through(gate: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the flags as numbers whose gradient is that of the gate; shapes are equal."""
    return kept.to(gate.dtype) + gate - gate.detach()


def gated_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    flags: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return causal attention with the weights multiplied by the flags of the keys; differentiable.

    p_ij = exp(s_ij) m_j / sum_k exp(s_ik) m_k with m_i = 1 for j = i. Forward it equals a mask of
    minus infinity; backward it gives a gradient to the gates of evicted tokens, which that would
    not.

    Args:
        queries: (Q, n, D).
        keys: (H, n, D).
        values: As ``keys``.
        flags: float (H, n): ``straight_through``.
        scaling: Factor on the dot products before the softmax.

    Returns:
        (Q, n, D).
    """
    num_tokens = keys.shape[1]
    grouped = queries.unflatten(0, (keys.shape[0], -1))  # (H, G, n, D)
    scores = (grouped @ keys.transpose(1, 2)[:, None]).float() * scaling
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=keys.device).triu(1)
    own = torch.eye(num_tokens, dtype=torch.bool, device=keys.device)
    seen = ~hidden & ((flags.detach() > 0.5)[:, None] | own)
    highest = scores.detach().masked_fill(~seen[:, None], -torch.inf).amax(-1, keepdim=True)
    # An evicted key may exceed what is seen; its weight matters to the gradient alone.
    weights = (scores - highest).clamp_max(20.0).exp().masked_fill(hidden, 0.0)
    weights = weights * torch.where(own, 1.0, flags[:, None])[:, None]
    weights = weights / weights.sum(-1, keepdim=True)
    output: torch.Tensor = weights.to(values.dtype) @ values[:, None]
    return output.flatten(0, 1)


def eviction_loss(
    gates: list[torch.Tensor], keep_rate: float, form: LossForm = "hinge", weight: float = 1.0
) -> torch.Tensor:
    """Return what is added to the task's loss so that tokens are evicted.

    Args:
        gates: Of each layer, float (tokens, H), 0 to 1; of valid tokens only.
        keep_rate: Wanted mean (the paper's beta).
        form: ``linear``: weight times the mean over the layers of mean - keep_rate, as printed; its
            gradient does not know the keep rate. ``hinge`` stops at the keep rate, ``absolute``
            holds it from both sides.
        weight: The paper's alpha.
    """
    excess = torch.stack([gate.mean() for gate in gates]) - keep_rate
    if form == "hinge":
        excess = excess.relu()
    elif form == "absolute":
        excess = excess.abs()
    return weight * excess.mean()


def num_gate_parameters(
    num_layers: int, width: int, num_kv_heads: int, gate_heads: int, gate_dim: int
) -> int:
    """Return how many numbers gates of these sizes have."""
    inner = gate_heads * gate_dim
    return num_layers * (3 * width * inner + inner * num_kv_heads + num_kv_heads)
