"""ZipVL: how many tokens matter is found in each layer, and a prompt attends to those alone.

Legend: Q query heads, H KV heads, n tokens of the prompt, D head_dim.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.kernels.colsum import column_sums
from kvstrata.kernels.saliency import probe_rows, seeing_rows
from kvstrata.methods.stage import Stage
from kvstrata.methods.token_scores import check_amount, largest
from kvstrata.protos.errors import LimitError

Rest = Literal["low_bit", "evict"]


class SparseAttention(NamedTuple):
    """What a layer made of a prompt.

    Attributes:
        output: (Q, n, D): zeros for the tokens that do not matter here, which pass this layer by
            their residual and may matter in the next.
        important: bool (n,): the tokens that matter, of all heads.
        received: float32 (H, n): the sum of attention over the probe rows, mean over a group.
    """

    output: torch.Tensor
    important: torch.Tensor
    received: torch.Tensor


@dataclass(frozen=True, slots=True)
class ZipVL(Stage):
    """A ratio of important tokens per layer, by the attention that they carry.

    Attributes:
        tau: Share of the probe rows' attention that the important tokens carry together, in
            (0, 1]; 1 means all tokens.
        recent_probes: The last rows that are asked: a count, or a share of the prompt.
        random_probes: How many of the earlier rows, drawn by ``seed``.
        seed: Of the draw.
        rest: What becomes of the other tokens' K and V: ``low_bit``: ZipCache's low bits, while
            important tokens get its high bits; ``evict``: nothing.
        min_tokens: Shorter prompts attend densely: finding the tokens costs more than it saves.
        forced: So many last rows always matter. The paper forces none; but the last row's output is
            the prediction, and would be zero.

    Source:
        ZipVL, arXiv:2410.08584, algorithm 1 and equations 6 to 9 (v1); ``evict`` is v2. The sum in
        equation 6 is taken of the mean over all heads, which gives the same count as any multiple.
    """

    tau: float = 0.975
    recent_probes: float = 64
    random_probes: float = 64
    seed: int = 0
    rest: Rest = "low_bit"
    min_tokens: int = 256
    forced: int = 1

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "arXiv:2410.08584"
    changes_blocks: ClassVar[bool] = True

    @property
    def needs_whole_prompt(self) -> bool:
        """Return True: which tokens matter, the prompt's last rows say."""
        return True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise LimitError(f"zipvl.tau must be in (0, 1], not {self.tau}", "0.975 is usual")
        check_amount("zipvl.recent_probes", self.recent_probes)
        check_amount("zipvl.random_probes", self.random_probes)
        if self.rest not in ("low_bit", "evict"):
            raise LimitError(
                f"zipvl.rest must be low_bit or evict, not {self.rest!r}", "use one of them"
            )
        if self.min_tokens < 0 or self.forced < 1:
            raise LimitError(
                "zipvl.min_tokens must be at least 0 and zipvl.forced at least 1",
                "leave them out for the defaults",
            )

    @classmethod
    def neutral(cls) -> Self:
        """Return settings under which every token matters."""
        return cls(tau=1.0, min_tokens=0)

    def probes(self, num_tokens: int) -> torch.Tensor:
        """Return the ascending rows of a prompt that are asked, int64 (r,); the last is one."""
        return probe_rows(num_tokens, self.recent_probes, self.random_probes, self.seed)

    def num_important(self, received: torch.Tensor) -> int:
        """Return the least p whose p largest sums hold ``tau`` of them all (equation 6).

        Args:
            received: float (n,), not negative: attention received, in any unit.
        """
        if self.tau == 1.0:
            return len(received)
        running = received.double().sort(descending=True).values.cumsum(0)
        wanted = torch.searchsorted(running, self.tau * running[-1])
        return min(len(received), int(wanted) + 1)

    def important(
        self, received: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tokens that matter, bool (n,): the highest by normalised score.

        How many, the sums tell; which, the sums divided by the number of rows that see a token.

        Args:
            received: float32 (n,), the sums over the probe rows.
            rows: int64 (r,), the probe rows.
            candidates: bool (n,): tokens that may matter, those that some head keeps; None for all.
        """
        normalised = received / seeing_rows(rows, len(received)).clamp_min(1)
        if candidates is None:
            chosen = largest(normalised, self.num_important(received))
        else:
            count = self.num_important(received[candidates]) if candidates.any() else 0
            chosen = largest(normalised.masked_fill(~candidates, -torch.inf), count) & candidates
        chosen[-self.forced :] = True
        return chosen

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        kept: torch.Tensor | None = None,
    ) -> SparseAttention:
        """Return causal attention of a whole prompt over its important tokens.

        Args:
            queries: Post-RoPE, (Q, n, D).
            keys: Post-RoPE, (H, n, D).
            values: As ``keys``.
            scaling: Factor on the dot products before the softmax.
            kept: bool (H, n): tokens that other queries of a head may see; None for all.
        """
        num_tokens = keys.shape[1]
        rows = self.probes(num_tokens).to(keys.device)
        sums = column_sums(queries[:, rows].contiguous(), keys.contiguous(), rows, scaling)
        candidates = None if kept is None else kept.any(0)
        important = self.important(sums.mean(0), rows, candidates)
        chosen = important.nonzero().flatten()  # ascending: compact causal is causal
        q, k, v = (x[:, chosen] for x in (queries, keys, values))
        found = _attend(q, k, v, scaling, None if kept is None else kept[:, chosen])
        output = torch.zeros_like(queries)
        output[:, chosen] = found
        return SparseAttention(output, important, sums.unflatten(0, (len(keys), -1)).mean(1))


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Return causal attention; a query sees itself and, of those before, what its head keeps."""
    grouped = queries.shape[0] != keys.shape[0]
    if kept is None:
        return F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=scaling,
            enable_gqa=grouped,
        )[0]  # fmt: skip
    num_tokens = keys.shape[1]
    own = torch.eye(num_tokens, dtype=torch.bool, device=keys.device)
    visible = (kept[:, None] & own.new_ones(own.shape).tril()) | own
    visible = visible.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    return F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=visible[None], scale=scaling,
        enable_gqa=grouped,
    )[0]  # fmt: skip
