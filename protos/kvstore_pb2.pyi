from kvstrata.protos import frame_pb2 as _frame_pb2
from kvstrata.protos import retention_pb2 as _retention_pb2
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

class WriteState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WRITE_STATE_UNSPECIFIED: _ClassVar[WriteState]
    WRITE_STATE_OPEN: _ClassVar[WriteState]
    WRITE_STATE_PENDING: _ClassVar[WriteState]
    WRITE_STATE_DONE: _ClassVar[WriteState]
PUT_OUTCOME_UNSPECIFIED: PutOutcome
PUT_OUTCOME_COMMITTED: PutOutcome
PUT_OUTCOME_EXISTS: PutOutcome
PUT_OUTCOME_REJECTED: PutOutcome
PUT_OUTCOME_KEPT: PutOutcome
SIMILARITY_UNSPECIFIED: Similarity
SIMILARITY_DOT: Similarity
SIMILARITY_COSINE: Similarity
WRITE_STATE_UNSPECIFIED: WriteState
WRITE_STATE_OPEN: WriteState
WRITE_STATE_PENDING: WriteState
WRITE_STATE_DONE: WriteState

class BlockKey(_message.Message):
    __slots__ = ("scope", "block_hash")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hash: bytes
    def __init__(self, scope: _Optional[bytes] = ..., block_hash: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "lease_ms", "retention")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    lease_ms: int
    retention: _retention_pb2.Retention
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., retention: _Optional[_Union[_retention_pb2.Retention, _Mapping]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("degraded", "pending", "strata", "tiers", "block_bytes", "tier_names")
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_NAMES_FIELD_NUMBER: _ClassVar[int]
    degraded: bool
    pending: int
    strata: bytes
    tiers: bytes
    block_bytes: _containers.RepeatedScalarFieldContainer[int]
    tier_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, degraded: _Optional[bool] = ..., pending: _Optional[int] = ..., strata: _Optional[bytes] = ..., tiers: _Optional[bytes] = ..., block_bytes: _Optional[_Iterable[int]] = ..., tier_names: _Optional[_Iterable[str]] = ...) -> None: ...

class StratumSize(_message.Message):
    __slots__ = ("stratum", "frame_bytes")
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    stratum: _frame_pb2.Stratum
    frame_bytes: int
    def __init__(self, stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., frame_bytes: _Optional[int] = ...) -> None: ...

class PutOpen(_message.Message):
    __slots__ = ("key", "strata", "durability", "retention")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    key: BlockKey
    strata: _containers.RepeatedCompositeFieldContainer[StratumSize]
    durability: str
    retention: _retention_pb2.Retention
    def __init__(self, key: _Optional[_Union[BlockKey, _Mapping]] = ..., strata: _Optional[_Iterable[_Union[StratumSize, _Mapping]]] = ..., durability: _Optional[str] = ..., retention: _Optional[_Union[_retention_pb2.Retention, _Mapping]] = ...) -> None: ...

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

class Piece(_message.Message):
    __slots__ = ("index", "stratum", "frame_bytes", "offset", "length", "last", "tier", "miss")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    index: int
    stratum: _frame_pb2.Stratum
    frame_bytes: int
    offset: int
    length: int
    last: bool
    tier: str
    miss: Miss
    def __init__(self, index: _Optional[int] = ..., stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., frame_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., last: _Optional[bool] = ..., tier: _Optional[str] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("data", "pieces")
    DATA_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    def __init__(self, data: _Optional[bytes] = ..., pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ...) -> None: ...

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

class LayerSegment(_message.Message):
    __slots__ = ("block", "stratum", "layer", "length", "checksum", "data")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    block: int
    stratum: _frame_pb2.Stratum
    layer: int
    length: int
    checksum: int
    data: bytes
    def __init__(self, block: _Optional[int] = ..., stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., layer: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class StratumHead(_message.Message):
    __slots__ = ("stratum", "head", "attachments")
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENTS_FIELD_NUMBER: _ClassVar[int]
    stratum: _frame_pb2.Stratum
    head: bytes
    attachments: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., head: _Optional[bytes] = ..., attachments: _Optional[_Iterable[bytes]] = ...) -> None: ...

class WriteOpen(_message.Message):
    __slots__ = ("block", "key", "header", "strata", "durability")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    block: int
    key: BlockKey
    header: _frame_pb2.FrameHeader
    strata: _containers.RepeatedCompositeFieldContainer[StratumSize]
    durability: str
    def __init__(self, block: _Optional[int] = ..., key: _Optional[_Union[BlockKey, _Mapping]] = ..., header: _Optional[_Union[_frame_pb2.FrameHeader, _Mapping]] = ..., strata: _Optional[_Iterable[_Union[StratumSize, _Mapping]]] = ..., durability: _Optional[str] = ...) -> None: ...

class WriteFinish(_message.Message):
    __slots__ = ("block", "heads")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    block: int
    heads: _containers.RepeatedCompositeFieldContainer[StratumHead]
    def __init__(self, block: _Optional[int] = ..., heads: _Optional[_Iterable[_Union[StratumHead, _Mapping]]] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("opens", "segments", "finishes", "aborts", "progress")
    OPENS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    opens: _containers.RepeatedCompositeFieldContainer[WriteOpen]
    segments: _containers.RepeatedCompositeFieldContainer[LayerSegment]
    finishes: _containers.RepeatedCompositeFieldContainer[WriteFinish]
    aborts: _containers.RepeatedScalarFieldContainer[int]
    progress: bool
    def __init__(self, opens: _Optional[_Iterable[_Union[WriteOpen, _Mapping]]] = ..., segments: _Optional[_Iterable[_Union[LayerSegment, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[WriteFinish, _Mapping]]] = ..., aborts: _Optional[_Iterable[int]] = ..., progress: _Optional[bool] = ...) -> None: ...

class WriteStatus(_message.Message):
    __slots__ = ("block", "state", "result")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    block: int
    state: WriteState
    result: PutReply
    def __init__(self, block: _Optional[int] = ..., state: _Optional[_Union[WriteState, str]] = ..., result: _Optional[_Union[PutReply, _Mapping]] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedCompositeFieldContainer[WriteStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[WriteStatus, _Mapping]]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("scope", "block_hashes", "strata", "silence_ms", "pending_only")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    STRATA_FIELD_NUMBER: _ClassVar[int]
    SILENCE_MS_FIELD_NUMBER: _ClassVar[int]
    PENDING_ONLY_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hashes: bytes
    strata: _containers.RepeatedScalarFieldContainer[_frame_pb2.Stratum]
    silence_ms: int
    pending_only: bool
    def __init__(self, scope: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., strata: _Optional[_Iterable[_Union[_frame_pb2.Stratum, str]]] = ..., silence_ms: _Optional[int] = ..., pending_only: _Optional[bool] = ...) -> None: ...

class AttachOpened(_message.Message):
    __slots__ = ("block", "header")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    block: int
    header: _frame_pb2.FrameHeader
    def __init__(self, block: _Optional[int] = ..., header: _Optional[_Union[_frame_pb2.FrameHeader, _Mapping]] = ...) -> None: ...

class StratumMiss(_message.Message):
    __slots__ = ("stratum", "miss")
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    stratum: _frame_pb2.Stratum
    miss: Miss
    def __init__(self, stratum: _Optional[_Union[_frame_pb2.Stratum, str]] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ...) -> None: ...

class AttachDone(_message.Message):
    __slots__ = ("block", "heads", "missing", "tier")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    block: int
    heads: _containers.RepeatedCompositeFieldContainer[StratumHead]
    missing: _containers.RepeatedCompositeFieldContainer[StratumMiss]
    tier: str
    def __init__(self, block: _Optional[int] = ..., heads: _Optional[_Iterable[_Union[StratumHead, _Mapping]]] = ..., missing: _Optional[_Iterable[_Union[StratumMiss, _Mapping]]] = ..., tier: _Optional[str] = ...) -> None: ...

class AttachMiss(_message.Message):
    __slots__ = ("block", "miss")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    block: int
    miss: Miss
    def __init__(self, block: _Optional[int] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("opened", "segments", "done", "misses")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    opened: _containers.RepeatedCompositeFieldContainer[AttachOpened]
    segments: _containers.RepeatedCompositeFieldContainer[LayerSegment]
    done: _containers.RepeatedCompositeFieldContainer[AttachDone]
    misses: _containers.RepeatedCompositeFieldContainer[AttachMiss]
    def __init__(self, opened: _Optional[_Iterable[_Union[AttachOpened, _Mapping]]] = ..., segments: _Optional[_Iterable[_Union[LayerSegment, _Mapping]]] = ..., done: _Optional[_Iterable[_Union[AttachDone, _Mapping]]] = ..., misses: _Optional[_Iterable[_Union[AttachMiss, _Mapping]]] = ...) -> None: ...

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
