"""The papers' stages in their one order: gate, attention, score, evict, quantise.

Every stage reads one record of what is cached, so that two of them never keep lists of their own:
which tokens a head holds, their true positions, and the scores, which are computed once. What that
means where two stages meet (numbers as in the table of the papers' pairs):

* R3, R4: the quantiser sees survivors only, and shares are shares of them.
* R10: ZipVL ranks by normalised scores, H2O adds up raw ones; both come from the same rows.
* R11: ZipVL chooses among tokens that some head keeps, and heads still mask their own.
* R15: the gate acts on the prompt, H2O on what it kept; what either protects stays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.codec import BlockCodec, SelectiveCodec
from kvstrata.methods.h2o import H2O
from kvstrata.methods.stage import Stage
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.errors import MethodConflictError

# By the name that requests and scopes use, in the order in which they act.
STAGES: dict[str, type[Stage]] = {s.name: s for s in (AttentionGate, ZipVL, H2O, ZipCache)}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Which of the papers act on a request's KV; none by default.

    Attributes:
        gate: Before attention.
        attention: Of the prompt.
        evict: After the prompt, and after every generated token.
        quantise: What is left; also says which rows are asked for scores.
    """

    gate: AttentionGate | None = None
    attention: ZipVL | None = None
    evict: H2O | None = None
    quantise: ZipCache | None = None

    @classmethod
    def of(cls, *stages: Stage) -> "Pipeline":
        """Return the pipeline of some stages, given in any order."""
        places = {AttentionGate: "gate", ZipVL: "attention", H2O: "evict", ZipCache: "quantise"}
        return cls(**{places[type(stage)]: stage for stage in stages})  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages, in the order in which they act."""
        every = (self.gate, self.attention, self.evict, self.quantise)
        return tuple(stage for stage in every if stage is not None)

    @property
    def leaves_out(self) -> bool:
        """Return whether stored blocks may lack tokens."""
        return self.gate is not None or (
            self.attention is not None and self.attention.rest == "evict"
        )

    @property
    def needs_whole_prompt(self) -> bool:
        """Return whether a block's KV depends on what follows it in the prompt.

        Then it is stored under a scope of that prompt alone.
        """
        return any(stage.needs_whole_prompt for stage in self.stages)

    def settings(self) -> str:
        """Return the canonical text of the stages that change stored blocks; part of the scope."""
        return ";".join(stage.settings() for stage in self.stages if stage.changes_blocks)

    def probes(self, num_tokens: int) -> torch.Tensor | None:
        """Return the rows of a prompt to score by, int64 (r,), ascending; None for the default."""
        for stage in (self.quantise, self.attention, self.evict):
            if stage is not None:
                return stage.probes(num_tokens)
        return None


class Rule(NamedTuple):
    """What must not be combined, and why."""

    name: str
    broken: Callable[[Pipeline, BlockCodec], bool]
    message: str
    remedy: str


RULES = (
    Rule(
        "lossless_and_quantised",
        lambda pipeline, codec: (
            codec.lossless
            and pipeline.quantise is not None
            and pipeline.quantise != ZipCache.neutral()
            and codec.name != pipeline.quantise.name
        ),
        "the codec keeps every bit, and zipcache lowers some",
        "leave out zipcache or choose another codec",
    ),
    Rule(
        "left_out_of_dense_blocks",
        lambda pipeline, codec: pipeline.leaves_out and not isinstance(codec, SelectiveCodec),
        "this codec's blocks hold all of their tokens, and a stage leaves some out",
        "use codec 'calibrated' or 'zipcache'",
    ),
)


def check(pipeline: Pipeline, codec: BlockCodec) -> None:
    """Refuse stages and codecs that exclude each other.

    Raises:
        MethodConflictError: Names the codec, the rule and the remedy.
    """
    for rule in RULES:
        if rule.broken(pipeline, codec):
            raise MethodConflictError(
                f"codec {codec.name!r}: {rule.message}", rule.remedy, rule=rule.name
            )
