"""What the rows of a prompt attend to, computed once and read by every stage of the pipeline.

Legend: L layers, H KV heads, n tokens of the prompt.
"""

from dataclasses import dataclass

import torch

from kvstrata.kernels.saliency import Normaliser, normalised_saliency, seeing_rows
from kvstrata.protos.errors import LimitError

NORMALISERS: tuple[Normaliser, ...] = ("probe_nnz", "full_nnz")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """How much attention each token of a prompt receives, per layer and KV head.

    Attributes:
        saliency: float32 (L, H, n), larger is more attended: the mean, over the rows that see the
            token and the query heads of its group, of the weight that they give it.
        rows: int64 (R,), ascending: the rows that were asked; all n, or probes.
    """

    saliency: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(
        cls, queries: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, scaling: float
    ) -> "TokenScores":
        """Score the tokens of a prompt by the attention of some of its rows.

        Args:
            queries: Post-RoPE queries of the rows, (L, query heads, R, D).
            rows: int64 (R,), ascending, their positions.
            keys: Post-RoPE keys of positions 0 to n - 1, (L, H, n, D).
            scaling: Factor on the dot products before the softmax.

        Raises:
            ValueError: What ``normalised_saliency`` refuses.
        """
        return cls(normalised_saliency(queries, rows, keys, scaling), rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.saliency.shape[-1]

    def normalised(self, normaliser: Normaliser = "probe_nnz") -> torch.Tensor:
        """Return the scores by which ZipCache and ZipVL rank tokens, float32 (L, H, n).

        ``full_nnz`` divides the sum over the rows that were asked by the number of *all* rows that
        could see the token, as ZipCache's code does; with probes that favours late tokens.
        """
        if normaliser == "probe_nnz":
            return self.saliency
        return self.saliency * seeing_rows(self.rows, self.num_tokens) / self._all_rows()

    def accumulated(self) -> torch.Tensor:
        """Return H2O's scores, float32 (L, H, n): the sum over all rows of the prompt.

        Exact if all rows were asked, and then a head's scores add up to n. From probes it is an
        estimate on the same scale, so that what decoding adds to it counts alike.
        """
        return self.saliency * self._all_rows()

    def _all_rows(self) -> torch.Tensor:
        """Return how many rows of the prompt see each token, (n,)."""
        return torch.arange(self.num_tokens, 0, -1, device=self.saliency.device)


def largest(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return bool (..., n): the ``count`` largest of each row; of equal ones the first.

    Args:
        scores: float (..., n).
        count: Of all rows, or int64 (...).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    wanted = count[..., None] if isinstance(count, torch.Tensor) else count
    among = (torch.arange(scores.shape[-1], device=scores.device) < wanted).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, among)


def num_of(amount: float, num_tokens: int) -> int:
    """Return how many tokens ``amount`` is: itself if an integer, else that share, rounded down."""
    return amount if isinstance(amount, int) else int(amount * num_tokens + 1e-9)


def check_amount(name: str, amount: float) -> None:
    """Refuse what is neither a count of tokens nor a share of them.

    Raises:
        LimitError: A negative count, or a share outside 0.0 to 1.0.
    """
    if isinstance(amount, int):
        if amount < 0:
            raise LimitError(f"{name} must be at least 0 tokens, not {amount}", "use a count")
    elif not 0 <= amount <= 1:
        raise LimitError(
            f"{name} must be a share from 0.0 to 1.0, not {amount}",
            "use such a share, or a count of tokens",
        )
