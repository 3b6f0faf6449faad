"""H2O: keep the tokens that gather attention, and the most recent ones; evict the others for good.

Legend: H KV heads, m held tokens of a head, in any order; a place that holds none has position -1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch

from kvstrata.methods.stage import Stage
from kvstrata.methods.token_scores import check_amount, num_of
from kvstrata.protos.errors import LimitError

Positions = Literal["absolute", "rolling"]
_UNLIMITED = 1 << 40


class Seats(NamedTuple):
    """How many tokens of each KV head stay: ``heavy`` by their score, the ``recent`` newest."""

    heavy: int
    recent: int

    @property
    def total(self) -> int:
        """The most that a head holds after each step."""
        return self.heavy + self.recent


@dataclass(frozen=True, slots=True)
class H2O(Stage):
    """Heavy hitters and a recent window, greedily, per layer and KV head.

    After the prompt the scores are the column sums of its attention and each head is cut down to
    its seats at once. Then every new token attends to what is held and itself, its weights are
    added to the scores, and the token with the least score outside the recent window leaves. A
    head's score is the mean over its query heads; the paper has no grouped heads.

    Attributes:
        heavy: Seats of heavy hitters: a share of the prompt, or a count of tokens.
        recent: Seats of the newest tokens, likewise.
        decay: Factor on all scores before a step's weights are added. The paper has 1: scores never
            fall, so that tokens of the prompt keep their seats whatever follows.
        grace: How many tokens that have just left the recent window are spared, as far as there
            are seats, so that they have time to gather a score. None in the paper.
        sinks: First tokens of the sequence that never leave; they take heavy seats. None in the
            paper; without the sink, tight budgets give garbage.
        positions: ``absolute``: keys stay rotated at their true positions. ``rolling``: the keys
            that are held are rotated to 0, 1, 2 and so on at each step, as the paper's streaming
            code does.

    Source:
        H2O, arXiv:2306.14048, algorithm 1; defaults from its released scripts.
    """

    heavy: float = 0.1
    recent: float = 0.1
    decay: float = 1.0
    grace: int = 0
    sinks: int = 0
    positions: Positions = "absolute"

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv:2306.14048"
    changes_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_amount("h2o.heavy", self.heavy)
        check_amount("h2o.recent", self.recent)
        shares = [amount for amount in (self.heavy, self.recent) if isinstance(amount, float)]
        if not self.heavy and not self.recent:
            raise LimitError("h2o has a budget of no tokens", "set heavy or recent above 0")
        if sum(shares) > 1 + 1e-9:
            raise LimitError(
                f"h2o.heavy and h2o.recent are {self.heavy} and {self.recent} of the prompt",
                "let them add up to at most 1",
            )
        if not 0 < self.decay <= 1:
            raise LimitError(f"h2o.decay must be in (0, 1], not {self.decay}", "1 is no decay")
        if self.grace < 0 or self.sinks < 0:
            raise LimitError("h2o.grace and h2o.sinks must not be negative", "0 is none")
        if self.positions not in ("absolute", "rolling"):
            raise LimitError(
                f"h2o.positions must be absolute or rolling, not {self.positions!r}",
                "use one of them",
            )

    @classmethod
    def neutral(cls) -> Self:
        """Return a budget that no sequence reaches."""
        return cls(heavy=_UNLIMITED, recent=0)

    def probes(self, num_tokens: int) -> torch.Tensor:
        """Return the rows of a prompt whose attention is added up: all, int64 (n,)."""
        return torch.arange(num_tokens)

    def seats(self, num_prompt: int) -> Seats:
        """Return the seats of a prompt's heads, fixed from then on; at least one in all."""
        heavy = max(num_of(self.heavy, num_prompt), self.sinks)
        recent = num_of(self.recent, num_prompt)
        return Seats(heavy, recent if heavy else max(1, recent))

    def keep(
        self, scores: torch.Tensor, positions: torch.Tensor, seats: Seats, *, decoding: bool = False
    ) -> torch.Tensor:
        """Return which of the held tokens stay, bool (..., m); at most ``seats.total`` per head.

        Args:
            scores: float32 (..., m), larger stays; of equal ones the earlier token.
            positions: int64 (..., m), or anything that broadcasts to it; -1 where nothing is held.
            seats: Of the prompt.
            decoding: Whether tokens of the grace period are spared.
        """
        positions = positions.expand_as(scores)
        held = positions >= 0
        recent = seats.recent
        if decoding:
            recent += min(self.grace, max(0, seats.heavy - self.sinks))
        oldest_spared = positions.amax(-1, keepdim=True) - recent
        spared = held & ((positions > oldest_spared) | (positions < self.sinks))
        rank = scores.masked_fill(spared, torch.inf).masked_fill(~held, -torch.inf)
        by_position = positions.masked_fill(~held, _UNLIMITED).argsort(-1)
        by_score = rank.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
        chosen = by_position.gather(-1, by_score)[..., : seats.total]
        return torch.zeros_like(held).scatter_(-1, chosen, True) & held

    def add(self, scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the scores after new rows.

        Args:
            scores: float32 (H, m), 0 for new tokens.
            weights: float32 (H, G, n, m): the softmax rows of n new tokens, G query heads a group.
        """
        return scores * self.decay ** weights.shape[2] + weights.mean(1).sum(1)
