from kvstrata.protos import frame_pb2 as _frame_pb2
from kvstrata.protos import retention_pb2 as _retention_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AttentionGateSettings(_message.Message):
    __slots__ = ("gates", "tau", "keep_first", "keep_last")
    GATES_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIRST_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    gates: str
    tau: float
    keep_first: int
    keep_last: int
    def __init__(self, gates: _Optional[str] = ..., tau: _Optional[float] = ..., keep_first: _Optional[int] = ..., keep_last: _Optional[int] = ...) -> None: ...

class ZipVLSettings(_message.Message):
    __slots__ = ("tau", "recent_probes", "recent_probes_tokens", "random_probes", "random_probes_tokens", "seed", "rest", "min_tokens", "forced")
    TAU_FIELD_NUMBER: _ClassVar[int]
    RECENT_PROBES_FIELD_NUMBER: _ClassVar[int]
    RECENT_PROBES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_PROBES_FIELD_NUMBER: _ClassVar[int]
    RANDOM_PROBES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    tau: float
    recent_probes: float
    recent_probes_tokens: int
    random_probes: float
    random_probes_tokens: int
    seed: int
    rest: str
    min_tokens: int
    forced: int
    def __init__(self, tau: _Optional[float] = ..., recent_probes: _Optional[float] = ..., recent_probes_tokens: _Optional[int] = ..., random_probes: _Optional[float] = ..., random_probes_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., rest: _Optional[str] = ..., min_tokens: _Optional[int] = ..., forced: _Optional[int] = ...) -> None: ...

class H2OSettings(_message.Message):
    __slots__ = ("heavy", "heavy_tokens", "recent", "recent_tokens", "decay", "grace", "sinks", "positions")
    HEAVY_FIELD_NUMBER: _ClassVar[int]
    HEAVY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    RECENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECAY_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    heavy: float
    heavy_tokens: int
    recent: float
    recent_tokens: int
    decay: float
    grace: int
    sinks: int
    positions: str
    def __init__(self, heavy: _Optional[float] = ..., heavy_tokens: _Optional[int] = ..., recent: _Optional[float] = ..., recent_tokens: _Optional[int] = ..., decay: _Optional[float] = ..., grace: _Optional[int] = ..., sinks: _Optional[int] = ..., positions: _Optional[str] = ...) -> None: ...

class ZipCacheSettings(_message.Message):
    __slots__ = ("salient", "high_bits", "low_bits", "recent_probes", "recent_probes_tokens", "random_probes", "random_probes_tokens", "seed", "normaliser", "share_heads", "quantiser")
    SALIENT_FIELD_NUMBER: _ClassVar[int]
    HIGH_BITS_FIELD_NUMBER: _ClassVar[int]
    LOW_BITS_FIELD_NUMBER: _ClassVar[int]
    RECENT_PROBES_FIELD_NUMBER: _ClassVar[int]
    RECENT_PROBES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_PROBES_FIELD_NUMBER: _ClassVar[int]
    RANDOM_PROBES_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    SHARE_HEADS_FIELD_NUMBER: _ClassVar[int]
    QUANTISER_FIELD_NUMBER: _ClassVar[int]
    salient: float
    high_bits: int
    low_bits: int
    recent_probes: float
    recent_probes_tokens: int
    random_probes: float
    random_probes_tokens: int
    seed: int
    normaliser: str
    share_heads: bool
    quantiser: str
    def __init__(self, salient: _Optional[float] = ..., high_bits: _Optional[int] = ..., low_bits: _Optional[int] = ..., recent_probes: _Optional[float] = ..., recent_probes_tokens: _Optional[int] = ..., random_probes: _Optional[float] = ..., random_probes_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., normaliser: _Optional[str] = ..., share_heads: _Optional[bool] = ..., quantiser: _Optional[str] = ...) -> None: ...

class SkipDecodeSettings(_message.Message):
    __slots__ = ("speedup", "max_layers", "min_layers", "decay_tokens", "warmup_layers")
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    MAX_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MIN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DECAY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_LAYERS_FIELD_NUMBER: _ClassVar[int]
    speedup: float
    max_layers: int
    min_layers: int
    decay_tokens: int
    warmup_layers: int
    def __init__(self, speedup: _Optional[float] = ..., max_layers: _Optional[int] = ..., min_layers: _Optional[int] = ..., decay_tokens: _Optional[int] = ..., warmup_layers: _Optional[int] = ...) -> None: ...

class MethodSettings(_message.Message):
    __slots__ = ("codec", "sink_tokens", "read_stratum", "bits", "max_kl", "key_form", "representatives", "attention_gate", "zipvl", "h2o", "zipcache", "skipdecode")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READ_STRATUM_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    MAX_KL_FIELD_NUMBER: _ClassVar[int]
    KEY_FORM_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATIVES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_GATE_FIELD_NUMBER: _ClassVar[int]
    ZIPVL_FIELD_NUMBER: _ClassVar[int]
    H2O_FIELD_NUMBER: _ClassVar[int]
    ZIPCACHE_FIELD_NUMBER: _ClassVar[int]
    SKIPDECODE_FIELD_NUMBER: _ClassVar[int]
    codec: str
    sink_tokens: int
    read_stratum: _frame_pb2.Stratum
    bits: float
    max_kl: float
    key_form: str
    representatives: str
    attention_gate: AttentionGateSettings
    zipvl: ZipVLSettings
    h2o: H2OSettings
    zipcache: ZipCacheSettings
    skipdecode: SkipDecodeSettings
    def __init__(self, codec: _Optional[str] = ..., sink_tokens: _Optional[int] = ..., read_stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., bits: _Optional[float] = ..., max_kl: _Optional[float] = ..., key_form: _Optional[str] = ..., representatives: _Optional[str] = ..., attention_gate: _Optional[_Union[AttentionGateSettings, _Mapping]] = ..., zipvl: _Optional[_Union[ZipVLSettings, _Mapping]] = ..., h2o: _Optional[_Union[H2OSettings, _Mapping]] = ..., zipcache: _Optional[_Union[ZipCacheSettings, _Mapping]] = ..., skipdecode: _Optional[_Union[SkipDecodeSettings, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class Picture(_message.Message):
    __slots__ = ("rgb", "file", "height", "width")
    RGB_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    rgb: bytes
    file: bytes
    height: int
    width: int
    def __init__(self, rgb: _Optional[bytes] = ..., file: _Optional[bytes] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Picture]
    def __init__(self, frames: _Optional[_Iterable[_Union[Picture, _Mapping]]] = ...) -> None: ...

class Visual(_message.Message):
    __slots__ = ("picture", "video")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    picture: Picture
    video: Video
    def __init__(self, picture: _Optional[_Union[Picture, _Mapping]] = ..., video: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("text", "messages", "token_ids", "preset", "settings", "sampling", "session_id", "model", "visuals", "coarsest_stratum", "first_token_ms", "retention")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VISUALS_FIELD_NUMBER: _ClassVar[int]
    COARSEST_STRATUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages: ChatMessages
    token_ids: TokenIds
    preset: str
    settings: MethodSettings
    sampling: Sampling
    session_id: str
    model: str
    visuals: _containers.RepeatedCompositeFieldContainer[Visual]
    coarsest_stratum: _frame_pb2.Stratum
    first_token_ms: int
    retention: _retention_pb2.Retention
    def __init__(self, text: _Optional[str] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., preset: _Optional[str] = ..., settings: _Optional[_Union[MethodSettings, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., session_id: _Optional[str] = ..., model: _Optional[str] = ..., visuals: _Optional[_Iterable[_Union[Visual, _Mapping]]] = ..., coarsest_stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., first_token_ms: _Optional[int] = ..., retention: _Optional[_Union[_retention_pb2.Retention, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "node", "start_unix_s", "seconds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    node: str
    start_unix_s: float
    seconds: float
    def __init__(self, stage: _Optional[str] = ..., node: _Optional[str] = ..., start_unix_s: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class Recompute(_message.Message):
    __slots__ = ("reason", "tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    tokens: int
    def __init__(self, reason: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class ReadPlan(_message.Message):
    __slots__ = ("node", "choice", "stored_blocks", "fetched_blocks", "predicted_s", "seconds", "refined_blocks", "predicted_refined_s", "refined_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REFINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_REFINED_S_FIELD_NUMBER: _ClassVar[int]
    REFINED_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    choice: str
    stored_blocks: int
    fetched_blocks: int
    predicted_s: float
    seconds: float
    refined_blocks: int
    predicted_refined_s: float
    refined_s: float
    def __init__(self, node: _Optional[str] = ..., choice: _Optional[str] = ..., stored_blocks: _Optional[int] = ..., fetched_blocks: _Optional[int] = ..., predicted_s: _Optional[float] = ..., seconds: _Optional[float] = ..., refined_blocks: _Optional[int] = ..., predicted_refined_s: _Optional[float] = ..., refined_s: _Optional[float] = ...) -> None: ...

class NodeUse(_message.Message):
    __slots__ = ("node", "worker", "pool_bytes", "pool_used_bytes", "parked", "expired", "gpu_bytes", "gpu_used_bytes", "gpu_busy", "graph_passes", "graph_failed_passes", "late_copies")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    GPU_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_BUSY_FIELD_NUMBER: _ClassVar[int]
    GRAPH_PASSES_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FAILED_PASSES_FIELD_NUMBER: _ClassVar[int]
    LATE_COPIES_FIELD_NUMBER: _ClassVar[int]
    node: str
    worker: str
    pool_bytes: int
    pool_used_bytes: int
    parked: int
    expired: int
    gpu_bytes: int
    gpu_used_bytes: int
    gpu_busy: float
    graph_passes: int
    graph_failed_passes: int
    late_copies: int
    def __init__(self, node: _Optional[str] = ..., worker: _Optional[str] = ..., pool_bytes: _Optional[int] = ..., pool_used_bytes: _Optional[int] = ..., parked: _Optional[int] = ..., expired: _Optional[int] = ..., gpu_bytes: _Optional[int] = ..., gpu_used_bytes: _Optional[int] = ..., gpu_busy: _Optional[float] = ..., graph_passes: _Optional[int] = ..., graph_failed_passes: _Optional[int] = ..., late_copies: _Optional[int] = ...) -> None: ...

class CacheReport(_message.Message):
    __slots__ = ("prompt_tokens", "shareable_tokens", "cached_tokens", "bytes_fetched", "bytes_published", "tier", "precision", "codec", "stages", "recomputes", "committed_blocks", "replays", "coalesced_tokens", "kept_fraction", "layer_bits", "read_plans", "nodes", "layer_executions")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHAREABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    COALESCED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FRACTION_FIELD_NUMBER: _ClassVar[int]
    LAYER_BITS_FIELD_NUMBER: _ClassVar[int]
    READ_PLANS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    shareable_tokens: int
    cached_tokens: int
    bytes_fetched: int
    bytes_published: int
    tier: str
    precision: str
    codec: str
    stages: _containers.RepeatedCompositeFieldContainer[StageTime]
    recomputes: _containers.RepeatedCompositeFieldContainer[Recompute]
    committed_blocks: int
    replays: int
    coalesced_tokens: int
    kept_fraction: float
    layer_bits: _containers.RepeatedScalarFieldContainer[float]
    read_plans: _containers.RepeatedCompositeFieldContainer[ReadPlan]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeUse]
    layer_executions: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., shareable_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., bytes_fetched: _Optional[int] = ..., bytes_published: _Optional[int] = ..., tier: _Optional[str] = ..., precision: _Optional[str] = ..., codec: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., recomputes: _Optional[_Iterable[_Union[Recompute, _Mapping]]] = ..., committed_blocks: _Optional[int] = ..., replays: _Optional[int] = ..., coalesced_tokens: _Optional[int] = ..., kept_fraction: _Optional[float] = ..., layer_bits: _Optional[_Iterable[float]] = ..., read_plans: _Optional[_Iterable[_Union[ReadPlan, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeUse, _Mapping]]] = ..., layer_executions: _Optional[int] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("token_ids", "text", "finish_reason", "usage", "cache")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    cache: CacheReport
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cache: _Optional[_Union[CacheReport, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelReply(_message.Message):
    __slots__ = ("name", "fingerprint", "max_positions", "vocab_size", "presets", "block_tokens", "kv_bytes_per_token_bf16", "profile_id", "placeholder", "picture_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_BF16_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEHOLDER_FIELD_NUMBER: _ClassVar[int]
    PICTURE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: bytes
    max_positions: int
    vocab_size: int
    presets: _containers.RepeatedScalarFieldContainer[str]
    block_tokens: int
    kv_bytes_per_token_bf16: int
    profile_id: str
    placeholder: str
    picture_tokens: int
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., max_positions: _Optional[int] = ..., vocab_size: _Optional[int] = ..., presets: _Optional[_Iterable[str]] = ..., block_tokens: _Optional[int] = ..., kv_bytes_per_token_bf16: _Optional[int] = ..., profile_id: _Optional[str] = ..., placeholder: _Optional[str] = ..., picture_tokens: _Optional[int] = ...) -> None: ...
