from kvstrata.protos import frame_pb2 as _frame_pb2
from kvstrata.protos import kvstore_pb2 as _kvstore_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierStats(_message.Message):
    __slots__ = ("tier", "healthy", "detail", "blocks", "bytes", "capacity_bytes", "hits", "evictions")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    healthy: bool
    detail: str
    blocks: int
    bytes: int
    capacity_bytes: int
    hits: int
    evictions: int
    def __init__(self, tier: _Optional[str] = ..., healthy: _Optional[bool] = ..., detail: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

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

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("tiers", "counters", "pinned_blocks", "pinned_bytes", "in_flight_puts", "uptime_s", "health")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_PUTS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    counters: _containers.RepeatedCompositeFieldContainer[Counter]
    pinned_blocks: int
    pinned_bytes: int
    in_flight_puts: int
    uptime_s: float
    health: str
    def __init__(self, tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., counters: _Optional[_Iterable[_Union[Counter, _Mapping]]] = ..., pinned_blocks: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., in_flight_puts: _Optional[int] = ..., uptime_s: _Optional[float] = ..., health: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("key", "strata", "tiers", "pinned")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    strata: _containers.RepeatedCompositeFieldContainer[_kvstore_pb2.StratumSize]
    tiers: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ..., strata: _Optional[_Iterable[_Union[_kvstore_pb2.StratumSize, _Mapping]]] = ..., tiers: _Optional[_Iterable[str]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class ListBlocksReply(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockListing]
    next_page_token: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockListing, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: _kvstore_pb2.BlockKey
    def __init__(self, key: _Optional[_Union[_kvstore_pb2.BlockKey, _Mapping]] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("block", "headers")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    block: BlockListing
    headers: _containers.RepeatedCompositeFieldContainer[_frame_pb2.FrameHeader]
    def __init__(self, block: _Optional[_Union[BlockListing, _Mapping]] = ..., headers: _Optional[_Iterable[_Union[_frame_pb2.FrameHeader, _Mapping]]] = ...) -> None: ...

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
