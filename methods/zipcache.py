"""ZipCache: more bits for the tokens that are attended, by a score without bias of age.

Legend: L layers, H KV heads, n tokens, D head_dim.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvstrata.kernels.saliency import Normaliser, probe_rows
from kvstrata.methods.stage import Stage
from kvstrata.methods.token_scores import NORMALISERS, TokenScores, check_amount, largest
from kvstrata.protos.errors import LimitError

Quantiser = Literal["strata", "published"]
QUANTISERS: tuple[Quantiser, ...] = ("strata", "published")
UNQUANTISED = 16  # bits that mean "as it is"
WIDTHS = (1, 2, 4, 8, UNQUANTISED)


@dataclass(frozen=True, slots=True)
class ZipCache(Stage):
    """Salient tokens at more bits than the others.

    Attributes:
        salient: Share of a prompt's tokens that get ``high_bits``.
        high_bits: Of salient tokens: 1, 2, 4, 8, or 16 for tokens as they are. With ``strata`` the
            bits of both classes only say, by their mean, how large a block shall be: who gets how
            many is the calibrated codec's decision, which the scores drive.
        low_bits: Of the other tokens.
        recent_probes: The last rows of the prompt that are asked: a share, or a count.
        random_probes: How many of the earlier rows, drawn by ``seed``.
        seed: Of the draw.
        normaliser: ``probe_nnz`` divides a token's sum by the probe rows that see it; ``full_nnz``
            by all rows that could, as the released code does, which favours late tokens.
        share_heads: One salient set per layer instead of one per KV head.
        quantiser: ``strata``: the calibrated codec. ``published``: channelwise keys and
            channel-separable tokenwise values (``zipcache_codec``).

    Source:
        ZipCache, arXiv:2405.14256, sections 4.1 to 4.3, and its released code.
    """

    salient: float = 0.6
    high_bits: int = 4
    low_bits: int = 2
    recent_probes: float = 0.05
    random_probes: float = 0.05
    seed: int = 0
    normaliser: Normaliser = "probe_nnz"
    share_heads: bool = False
    quantiser: Quantiser = "strata"

    name: ClassVar[str] = "zipcache"
    paper: ClassVar[str] = "arXiv:2405.14256"
    changes_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.salient <= 1:
            raise LimitError(
                f"zipcache.salient must be a share from 0 to 1, not {self.salient}", "0.6 is usual"
            )
        for name, bits in (("high_bits", self.high_bits), ("low_bits", self.low_bits)):
            if bits not in WIDTHS:
                raise LimitError(
                    f"zipcache.{name} must be 1, 2, 4, 8 or 16, not {bits}", "4 and 2 are usual"
                )
        if self.low_bits > self.high_bits:
            raise LimitError(
                f"zipcache.low_bits is {self.low_bits}, above high_bits, {self.high_bits}",
                "give salient tokens at least as many bits",
            )
        check_amount("zipcache.recent_probes", self.recent_probes)
        check_amount("zipcache.random_probes", self.random_probes)
        if self.normaliser not in NORMALISERS:
            raise LimitError(
                f"zipcache.normaliser must be probe_nnz or full_nnz, not {self.normaliser!r}",
                "probe_nnz is right, full_nnz is what the released code does",
            )
        if self.quantiser not in QUANTISERS:
            raise LimitError(
                f"zipcache.quantiser must be strata or published, not {self.quantiser!r}",
                "use one of them",
            )

    @classmethod
    def neutral(cls) -> Self:
        """Return settings that quantise nothing."""
        return cls(salient=1.0, high_bits=UNQUANTISED, low_bits=UNQUANTISED, quantiser="published")

    def probes(self, num_tokens: int) -> torch.Tensor:
        """Return the ascending rows of a prompt that are asked, int64 (r,); the last is one."""
        return probe_rows(num_tokens, self.recent_probes, self.random_probes, self.seed)

    def salient_tokens(self, scores: TokenScores) -> torch.Tensor:
        """Return which tokens are salient, bool (L, H, n).

        The ``floor((1 - salient) n)`` lowest are not; of equal ones the earlier is salient.
        """
        ranked = scores.normalised(self.normaliser)
        if self.share_heads:
            ranked = ranked.mean(1, keepdim=True).expand_as(ranked)
        regular = int((1 - self.salient) * scores.num_tokens + 1e-9)
        return largest(ranked, scores.num_tokens - regular)

    @property
    def mean_bits(self) -> float:
        """Bits per code: 3.2 by default."""
        return self.salient * self.high_bits + (1 - self.salient) * self.low_bits
