from kvstrata.protos import frame_pb2 as _frame_pb2
from kvstrata.protos import inference_pb2 as _inference_pb2
from kvstrata.protos import kvstore_pb2 as _kvstore_pb2
from kvstrata.protos import retention_pb2 as _retention_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierStats(_message.Message):
    __slots__ = ("tier", "healthy", "detail", "blocks", "bytes", "capacity_bytes", "hits", "evictions", "behind_bytes", "max_behind_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    BEHIND_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BEHIND_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    healthy: bool
    detail: str
    blocks: int
    bytes: int
    capacity_bytes: int
    hits: int
    evictions: int
    behind_bytes: int
    max_behind_bytes: int
    def __init__(self, tier: _Optional[str] = ..., healthy: _Optional[bool] = ..., detail: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., evictions: _Optional[int] = ..., behind_bytes: _Optional[int] = ..., max_behind_bytes: _Optional[int] = ...) -> None: ...

class Counter(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: int
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[int] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("name", "labels", "bounds_s", "counts", "sum_s")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., bounds_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...

class Gauge(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("tiers", "counters", "pinned_blocks", "pinned_bytes", "in_flight_puts", "uptime_s", "health", "histograms", "gauges")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_PUTS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    GAUGES_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    counters: _containers.RepeatedCompositeFieldContainer[Counter]
    pinned_blocks: int
    pinned_bytes: int
    in_flight_puts: int
    uptime_s: float
    health: str
    histograms: _containers.RepeatedCompositeFieldContainer[Histogram]
    gauges: _containers.RepeatedCompositeFieldContainer[Gauge]
    def __init__(self, tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., counters: _Optional[_Iterable[_Union[Counter, _Mapping]]] = ..., pinned_blocks: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., in_flight_puts: _Optional[int] = ..., uptime_s: _Optional[float] = ..., health: _Optional[str] = ..., histograms: _Optional[_Iterable[_Union[Histogram, _Mapping]]] = ..., gauges: _Optional[_Iterable[_Union[Gauge, _Mapping]]] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "scope")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    scope: bytes
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., scope: _Optional[bytes] = ...) -> None: ...

class BlockListing(_message.Message):
    __slots__ = ("key", "strata", "tiers", "pinned", "priority", "sessions", "keep_ms")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KEEP_MS_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    strata: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.StratumSize]
    tiers: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    priority: _retention_pb2.Priority
    sessions: int
    keep_ms: int
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ..., strata: _Optional[_Iterable[_Union[_kvstore_pb2.StratumSize, _Mapping]]] = ..., tiers: _Optional[_Iterable[str]] = ..., pinned: _Optional[bool] = ..., priority: _Optional[_Union[_retention_pb2.Priority, str]] = ..., sessions: _Optional[int] = ..., keep_ms: _Optional[int] = ...) -> None: ...

class ListBlocksReply(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockListing]
    next_page_token: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockListing, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key", "tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    tokens: bool
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ..., tokens: _Optional[bool] = ...) -> None: ...

class LayerTokens(_message.Message):
    __slots__ = ("layer", "saliency", "escape", "mid", "dropped")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SALIENCY_FIELD_NUMBER: _ClassVar[int]
    ESCAPE_FIELD_NUMBER: _ClassVar[int]
    MID_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    saliency: bytes
    escape: _containers.RepeatedScalarFieldContainer[int]
    mid: _containers.RepeatedScalarFieldContainer[int]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., saliency: _Optional[bytes] = ..., escape: _Optional[_Iterable[int]] = ..., mid: _Optional[_Iterable[int]] = ..., dropped: _Optional[_Iterable[int]] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("block", "headers", "layers", "tokens_unknown")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    block: BlockListing
    headers: _containers.RepeatedCompositeFieldContainer[_frame_pb2.FrameHeader]
    layers: _containers.RepeatedCompositeFieldContainer[LayerTokens]
    tokens_unknown: str
    def __init__(self, block: _Optional[_Union[BlockListing, _Mapping]] = ..., headers: _Optional[_Iterable[_Union[_frame_pb2.FrameHeader, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerTokens, _Mapping]]] = ..., tokens_unknown: _Optional[str] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys", "tier")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.BlockKey]
    tier: str
    def __init__(self, keys: _Optional[_Iterable[_Union[_kvstore_pb2.BlockKey, _Mapping]]] = ..., tier: _Optional[str] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("evicted", "skipped_pinned")
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_PINNED_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    skipped_pinned: int
    def __init__(self, evicted: _Optional[int] = ..., skipped_pinned: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drained", "in_flight")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    in_flight: int
    def __init__(self, drained: _Optional[bool] = ..., in_flight: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "token_ids", "tenant", "own_keys", "prompt")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    OWN_KEYS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tenant: str
    own_keys: bool
    prompt: _inference_pb2.GenerateRequest
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., tenant: _Optional[str] = ..., own_keys: _Optional[bool] = ..., prompt: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("tier", "reason", "unix_s")
    TIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    tier: str
    reason: str
    unix_s: float
    def __init__(self, tier: _Optional[str] = ..., reason: _Optional[str] = ..., unix_s: _Optional[float] = ...) -> None: ...

class BlockState(_message.Message):
    __slots__ = ("listing", "departures")
    LISTING_FIELD_NUMBER: _ClassVar[int]
    DEPARTURES_FIELD_NUMBER: _ClassVar[int]
    listing: BlockListing
    departures: _containers.RepeatedCompositeFieldContainer[Departure]
    def __init__(self, listing: _Optional[_Union[BlockListing, _Mapping]] = ..., departures: _Optional[_Iterable[_Union[Departure, _Mapping]]] = ...) -> None: ...

class OtherScope(_message.Message):
    __slots__ = ("scope", "preset", "header", "run")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    preset: str
    header: _frame_pb2.FrameHeader
    run: int
    def __init__(self, scope: _Optional[bytes] = ..., preset: _Optional[str] = ..., header: _Optional[_Union[_frame_pb2.FrameHeader, _Mapping]] = ..., run: _Optional[int] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("blocks", "run", "others", "remembers_since_unix_s", "degraded", "prompt_tokens", "scope", "preset", "codec", "settings", "kv_dtype")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    REMEMBERS_SINCE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockState]
    run: int
    others: _containers.RepeatedCompositeFieldContainer[OtherScope]
    remembers_since_unix_s: float
    degraded: bool
    prompt_tokens: int
    scope: bytes
    preset: str
    codec: str
    settings: str
    kv_dtype: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockState, _Mapping]]] = ..., run: _Optional[int] = ..., others: _Optional[_Iterable[_Union[OtherScope, _Mapping]]] = ..., remembers_since_unix_s: _Optional[float] = ..., degraded: _Optional[bool] = ..., prompt_tokens: _Optional[int] = ..., scope: _Optional[bytes] = ..., preset: _Optional[str] = ..., codec: _Optional[str] = ..., settings: _Optional[str] = ..., kv_dtype: _Optional[str] = ...) -> None: ...

class MoveRequest(_message.Message):
    __slots__ = ("keys", "source", "target")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.BlockKey]
    source: str
    target: str
    def __init__(self, keys: _Optional[_Iterable[_Union[_kvstore_pb2.BlockKey, _Mapping]]] = ..., source: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class MoveProblem(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    reason: str
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class MoveReply(_message.Message):
    __slots__ = ("moved", "problems")
    MOVED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    moved: int
    problems: _containers.RepeatedCompositeFieldContainer[MoveProblem]
    def __init__(self, moved: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[MoveProblem, _Mapping]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("tier", "keys", "repair")
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    tier: str
    keys: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.BlockKey]
    repair: bool
    def __init__(self, tier: _Optional[str] = ..., keys: _Optional[_Iterable[_Union[_kvstore_pb2.BlockKey, _Mapping]]] = ..., repair: _Optional[bool] = ...) -> None: ...

class Damage(_message.Message):
    __slots__ = ("key", "stratum", "tier", "what")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    stratum: _frame_pb2.Stratum
    tier: str
    what: str
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ..., stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., tier: _Optional[str] = ..., what: _Optional[str] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("checked_strata", "checked_bytes", "checked_blocks", "total_blocks", "damaged", "num_damaged", "num_undecryptable", "unavailable", "done")
    CHECKED_STRATA_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    NUM_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNDECRYPTABLE_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    checked_strata: int
    checked_bytes: int
    checked_blocks: int
    total_blocks: int
    damaged: _containers.RepeatedCompositeFieldContainer[Damage]
    num_damaged: int
    num_undecryptable: int
    unavailable: _containers.RepeatedScalarFieldContainer[str]
    done: bool
    def __init__(self, checked_strata: _Optional[int] = ..., checked_bytes: _Optional[int] = ..., checked_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., damaged: _Optional[_Iterable[_Union[Damage, _Mapping]]] = ..., num_damaged: _Optional[int] = ..., num_undecryptable: _Optional[int] = ..., unavailable: _Optional[_Iterable[str]] = ..., done: _Optional[bool] = ...) -> None: ...

class QuotaRequest(_message.Message):
    __slots__ = ("tenant", "quota_bytes", "requests_per_s", "in_flight_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    quota_bytes: int
    requests_per_s: float
    in_flight_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., quota_bytes: _Optional[int] = ..., requests_per_s: _Optional[float] = ..., in_flight_bytes: _Optional[int] = ...) -> None: ...

class TenantQuota(_message.Message):
    __slots__ = ("tenant", "quota_bytes", "requests_per_s", "in_flight_bytes", "stored_bytes_now", "in_flight_bytes_now")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_NOW_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_NOW_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    quota_bytes: int
    requests_per_s: float
    in_flight_bytes: int
    stored_bytes_now: int
    in_flight_bytes_now: int
    def __init__(self, tenant: _Optional[str] = ..., quota_bytes: _Optional[int] = ..., requests_per_s: _Optional[float] = ..., in_flight_bytes: _Optional[int] = ..., stored_bytes_now: _Optional[int] = ..., in_flight_bytes_now: _Optional[int] = ...) -> None: ...

class QuotaReply(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantQuota]
    def __init__(self, tenants: _Optional[_Iterable[_Union[TenantQuota, _Mapping]]] = ...) -> None: ...
