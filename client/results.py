"""What a request gives back: frozen values, each built from its message of the contract."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvstrata.protos import inference_pb2 as pb

FinishReason = Literal["stop", "length"]

FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def from_proto(cls, message: pb.Usage) -> "Usage":
        """Return the value of ``message``."""
        return cls(message.prompt_tokens, message.completion_tokens)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a request's life, in wall-clock seconds of the node that ran it."""

    stage: str
    node: str
    start_unix_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Recompute:
    """Tokens that were computed although the cache was asked for them, and why."""

    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How a node read the stored blocks of a prompt.

    Attributes:
        node: "prefill" or "decode".
        choice: "full", "refine" (coarse first, the rest while tokens come), "fewer_strata", "part"
            (the first blocks fetched, the others computed) or "recompute".
        stored_blocks: Blocks that the store had.
        fetched_blocks: Of these, planned to be fetched.
        predicted_s: What the node expected until all blocks are there; 0: it could not tell yet.
        seconds: What it took.
        refined_blocks: Under "refine", those that were refined before the answer ended.
        predicted_refined_s: When the node expected all of them to be, from the start.
        refined_s: When they were; 0 if some were not.
    """

    node: str
    choice: str
    stored_blocks: int
    fetched_blocks: int
    predicted_s: float
    seconds: float
    refined_blocks: int = 0
    predicted_refined_s: float = 0.0
    refined_s: float = 0.0

    @classmethod
    def from_proto(cls, message: pb.ReadPlan) -> "ReadPlan":
        """Return the value of ``message``."""
        return cls(
            message.node,
            message.choice,
            message.stored_blocks,
            message.fetched_blocks,
            message.predicted_s,
            message.seconds,
            message.refined_blocks,
            message.predicted_refined_s,
            message.refined_s,
        )


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the cache did for one request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        shareable_tokens: Prompt tokens in full blocks; only these can come from the cache.
        cached_tokens: Of these, found in the store when the request came.
        bytes_fetched: Store to nodes, this request.
        bytes_published: Nodes to store, this request.
        tier: Farthest tier that a block of this request came from; empty without a hit.
        precision: Strata attended, such as "exact", "base+mid" or "base".
        codec: Codec of the blocks.
        stages: Where the time went.
        recomputes: Work done over, with reasons.
        committed_blocks: New blocks that later requests can hit.
        replays: Times the request moved to another worker.
        kept_fraction: Of all tokens and KV heads, what the running cache held at the end.
        layer_bits: Stored bits per element of K and V, layer by layer; 0 where K and V are
            recomputed from token ids.
        layer_executions: Layers that ran for generated tokens under SkipDecode; 0 without it.
        read_plans: How nodes read what was stored, each time that they did.
    """

    prompt_tokens: int = 0
    shareable_tokens: int = 0
    cached_tokens: int = 0
    bytes_fetched: int = 0
    bytes_published: int = 0
    tier: str = ""
    precision: str = ""
    codec: str = ""
    stages: tuple[StageTime, ...] = ()
    recomputes: tuple[Recompute, ...] = ()
    committed_blocks: int = 0
    replays: int = 0
    kept_fraction: float = 1.0
    layer_bits: tuple[float, ...] = ()
    read_plans: tuple[ReadPlan, ...] = ()
    layer_executions: int = 0

    @property
    def cached_fraction(self) -> float:
        """Cached over shareable tokens, from 0 to 1; 0 where nothing was shareable."""
        return self.cached_tokens / self.shareable_tokens if self.shareable_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every field and ``cached_fraction`` as plain values for JSON."""
        return {**asdict(self), "cached_fraction": self.cached_fraction}

    @classmethod
    def from_proto(cls, message: pb.CacheReport) -> "CacheReport":
        """Return the value of ``message``."""
        return cls(
            prompt_tokens=message.prompt_tokens,
            shareable_tokens=message.shareable_tokens,
            cached_tokens=message.cached_tokens,
            bytes_fetched=message.bytes_fetched,
            bytes_published=message.bytes_published,
            tier=message.tier,
            precision=message.precision,
            codec=message.codec,
            stages=tuple(
                StageTime(s.stage, s.node, s.start_unix_s, s.seconds) for s in message.stages
            ),
            recomputes=tuple(Recompute(r.reason, r.tokens) for r in message.recomputes),
            committed_blocks=message.committed_blocks,
            replays=message.replays,
            kept_fraction=message.kept_fraction,
            layer_bits=tuple(message.layer_bits),
            read_plans=tuple(map(ReadPlan.from_proto, message.read_plans)),
            layer_executions=message.layer_executions,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the continuation. ``text`` may be empty while a character is still incomplete."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole continuation, with what it cost."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    cache: CacheReport

    def to_dict(self) -> dict[str, Any]:
        """Return the completion as plain values for JSON; the keys are stable."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage),
            "cache": self.cache.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model, its limits and its presets. ``fingerprint`` is hex.

    ``placeholder`` marks the place of an image in a prompt, and is empty for a model of text alone;
    each picture, or frame of a video, takes ``picture_tokens`` tokens.
    """

    name: str
    fingerprint: str
    max_positions: int
    vocab_size: int
    presets: tuple[str, ...]
    block_tokens: int
    kv_bytes_per_token_bf16: int
    placeholder: str = ""
    picture_tokens: int = 0

    @classmethod
    def from_proto(cls, message: pb.GetModelReply) -> "ModelInfo":
        """Return the value of ``message``."""
        return cls(
            name=message.name,
            fingerprint=message.fingerprint.hex(),
            max_positions=message.max_positions,
            vocab_size=message.vocab_size,
            presets=tuple(message.presets),
            block_tokens=message.block_tokens,
            kv_bytes_per_token_bf16=message.kv_bytes_per_token_bf16,
            placeholder=message.placeholder,
            picture_tokens=message.picture_tokens,
        )
