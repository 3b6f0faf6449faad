from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stratum(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRATUM_UNSPECIFIED: _ClassVar[Stratum]
    STRATUM_BASE: _ClassVar[Stratum]
    STRATUM_MID: _ClassVar[Stratum]
    STRATUM_FINE: _ClassVar[Stratum]
    STRATUM_EXACT: _ClassVar[Stratum]

class RopeForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROPE_FORM_UNSPECIFIED: _ClassVar[RopeForm]
    ROPE_FORM_NONE: _ClassVar[RopeForm]
    ROPE_FORM_PRE: _ClassVar[RopeForm]
    ROPE_FORM_FRAME: _ClassVar[RopeForm]
    ROPE_FORM_POST: _ClassVar[RopeForm]
STRATUM_UNSPECIFIED: Stratum
STRATUM_BASE: Stratum
STRATUM_MID: Stratum
STRATUM_FINE: Stratum
STRATUM_EXACT: Stratum
ROPE_FORM_UNSPECIFIED: RopeForm
ROPE_FORM_NONE: RopeForm
ROPE_FORM_PRE: RopeForm
ROPE_FORM_FRAME: RopeForm
ROPE_FORM_POST: RopeForm

class Segment(_message.Message):
    __slots__ = ("layer", "offset", "length", "checksum")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    offset: int
    length: int
    checksum: int
    def __init__(self, layer: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Attachment(_message.Message):
    __slots__ = ("name", "offset", "length", "checksum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    length: int
    checksum: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("scope", "block_hash", "parent_hash", "stratum", "encoding_id", "codec", "codec_version", "profile", "rope", "kv_dtype", "num_layers", "num_kv_heads", "head_dim", "first_position", "token_ids", "segments", "attachments")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    STRATUM_FIELD_NUMBER: _ClassVar[int]
    ENCODING_ID_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENTS_FIELD_NUMBER: _ClassVar[int]
    scope: bytes
    block_hash: bytes
    parent_hash: bytes
    stratum: Stratum
    encoding_id: bytes
    codec: str
    codec_version: int
    profile: bytes
    rope: RopeForm
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    first_position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    attachments: _containers.RepeatedCompositeFieldContainer[Attachment]
    def __init__(self, scope: _Optional[bytes] = ..., block_hash: _Optional[bytes] = ..., parent_hash: _Optional[bytes] = ..., stratum: _Optional[_Union[Stratum, str]] = ..., encoding_id: _Optional[bytes] = ..., codec: _Optional[str] = ..., codec_version: _Optional[int] = ..., profile: _Optional[bytes] = ..., rope: _Optional[_Union[RopeForm, str]] = ..., kv_dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., attachments: _Optional[_Iterable[_Union[Attachment, _Mapping]]] = ...) -> None: ...
