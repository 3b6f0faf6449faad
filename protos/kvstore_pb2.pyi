from kvstrata.protos import frame_pb2 as _frame_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUT_OUTCOME_UNSPECIFIED: _ClassVar[PutOutcome]
    PUT_OUTCOME_COMMITTED: _ClassVar[PutOutcome]
    PUT_OUTCOME_EXISTS: _ClassVar[PutOutcome]
    PUT_OUTCOME_REJECTED: _ClassVar[PutOutcome]
    PUT_OUTCOME_KEPT: _ClassVar[PutOutcome]

class Similarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIMILARITY_UNSPECIFIED: _ClassVar[Similarity]
    SIMILARITY_DOT: _ClassVar[Similarity]
    SIMILARITY_COSINE: _ClassVar[Similarity]
PUT_OUTCOME_UNSPECIFIED: PutOutcome
PUT_OUTCOME_COMMITTED: PutOutcome
PUT_OUTCOME_EXISTS: PutOutcome
PUT_OUTCOME_REJECTED: PutOutcome
PUT_OUTCOME_KEPT: PutOutcome
SIMILARITY_UNSPECIFIED: Similarity
SIMILARITY_DOT: Similarity
SIMILARITY_COSINE: Similarity

class BlockKey(_message.Message):
    __slots__ = ("scope", "block_hash")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hash: bytes
    def __init__(self, scope: _Optional[bytes] = ..., block_hash: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "lease_ms")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    lease_ms: int
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("strata", "bytes", "tier")
    STRATA_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    strata: _containers.RepeatedScalarFieldContainer[_frame_pb2.Stratum]
    bytes: int
    tier: str
    def __init__(self, strata: _Optional[_Iterable[_Union[_frame_pb2.Stratum, str]]] = ..., bytes: _Optional[int] = ..., tier: _Optional[str] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("blocks", "degraded")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    degraded: bool
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., degraded: _Optional[bool] = ...) -> None: ...

class StratumSize(_message.Message):
    __slots__ = ("stratum", "frame_bytes")
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    stratum: _frame_pb2.Stratum
    frame_bytes: int
    def __init__(self, stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., frame_bytes: _Optional[int] = ...) -> None: ...

class PutOpen(_message.Message):
    __slots__ = ("key", "strata", "durability")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    key: BlockKey
    strata: _containers.RepeatedCompositeFieldContainer[StratumSize]
    durability: str
    def __init__(self, key: _Optional[_Union[BlockKey, _Mapping]] = ..., strata: _Optional[_Iterable[_Union[StratumSize, _Mapping]]] = ..., durability: _Optional[str] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("open", "data")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    open: PutOpen
    data: bytes
    def __init__(self, open: _Optional[_Union[PutOpen, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("key", "outcome", "reason", "tiers")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    key: BlockKey
    outcome: PutOutcome
    reason: str
    tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[BlockKey, _Mapping]] = ..., outcome: _Optional[_Union[PutOutcome, str]] = ..., reason: _Optional[str] = ..., tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "strata", "first_layer", "last_layer", "wait_ms")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    strata: _containers.RepeatedScalarFieldContainer[_frame_pb2.Stratum]
    first_layer: int
    last_layer: int
    wait_ms: int
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., strata: _Optional[_Iterable[_Union[_frame_pb2.Stratum, str]]] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("index", "stratum", "frame_bytes", "offset", "data", "last", "tier", "miss")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    index: int
    stratum: _frame_pb2.Stratum
    frame_bytes: int
    offset: int
    data: bytes
    last: bool
    tier: str
    miss: Miss
    def __init__(self, index: _Optional[int] = ..., stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., frame_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ..., tier: _Optional[str] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ...) -> None: ...

class RetrieveQuery(_message.Message):
    __slots__ = ("layer", "vector")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    layer: int
    vector: bytes
    def __init__(self, layer: _Optional[int] = ..., vector: _Optional[bytes] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "queries", "top_k", "chunk_blocks", "sink_blocks", "recent_blocks", "similarity")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SINK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    queries: _containers.RepeatedCompositeFieldContainer[RetrieveQuery]
    top_k: int
    chunk_blocks: int
    sink_blocks: int
    recent_blocks: int
    similarity: Similarity
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., queries: _Optional[_Iterable[_Union[RetrieveQuery, _Mapping]]] = ..., top_k: _Optional[int] = ..., chunk_blocks: _Optional[int] = ..., sink_blocks: _Optional[int] = ..., recent_blocks: _Optional[int] = ..., similarity: _Optional[_Union[Similarity, str]] = ...) -> None: ...

class RetrieveSelection(_message.Message):
    __slots__ = ("ids", "scores")
    IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class RetrieveReply(_message.Message):
    __slots__ = ("selections", "block_hashes", "absent", "unrepresented", "degraded", "truncated")
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    UNREPRESENTED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    selections: _containers.RepeatedCompositeFieldContainer[RetrieveSelection]
    block_hashes: bytes
    absent: _containers.RepeatedScalarFieldContainer[int]
    unrepresented: _containers.RepeatedScalarFieldContainer[int]
    degraded: bool
    truncated: bool
    def __init__(self, selections: _Optional[_Iterable[_Union[RetrieveSelection, _Mapping]]] = ..., block_hashes: _Optional[bytes] = ..., absent: _Optional[_Iterable[int]] = ..., unrepresented: _Optional[_Iterable[int]] = ..., degraded: _Optional[bool] = ..., truncated: _Optional[bool] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "ttl_ms")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[BlockKey]
    ttl_ms: int
    def __init__(self, keys: _Optional[_Iterable[_Union[BlockKey, _Mapping]]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("missing",)
    MISSING_FIELD_NUMBER: _ClassVar[int]
    missing: _containers.RepeatedCompositeFieldContainer[BlockKey]
    def __init__(self, missing: _Optional[_Iterable[_Union[BlockKey, _Mapping]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[BlockKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[BlockKey, _Mapping]]] = ...) -> None: ...

class UnpinReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[BlockKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[BlockKey, _Mapping]]] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    def __init__(self, deleted: _Optional[int] = ...) -> None: ...
