"""The bytes of one stratum of one block: a frame.

Layout, little-endian; everything after the prelude may move in a later version, the prelude never::

    offset  size  field
    0       8     magic "KVSTRATA"
    8       2     version, 1
    10      2     flags, 0
    12      4     header length H in bytes
    16      8     frame length in bytes
    24      8     XXH3-64 of bytes 0..23 and of the header
    32      H     FrameHeader (protobuf), with the offset table
    ...           zero bytes up to the next multiple of 64
    ...           segments in ascending layer order, then attachments, each at a multiple of 64,
                  zero bytes between them

A received buffer is used in place: segments are views, 64-byte aligned within the frame. A reader
may hold only the header and some layers; each segment has its own checksum, verified when it is
taken.

A frame of one layer with the two bytes ``ab cd`` begins so (header shortened)::

    00000000  4b 56 53 54 52 41 54 41  01 00 00 00 5e 00 00 00  |KVSTRATA....^...|
    00000010  c2 00 00 00 00 00 00 00  <8 bytes of checksum>    |................|
    00000020  0a 10 ...                                         |FrameHeader|
    000000c0  ab cd                                             |segment of layer 0|

Not covered: which strata belong together (``encoding_id``, compared by the codec's reader).
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import xxhash
from google.protobuf.message import DecodeError

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import Attachment, FrameHeader, Segment, Stratum

MAGIC = b"KVSTRATA"
VERSION = 1
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 20
MAX_FRAME_BYTES = 1 << 30

_PRELUDE = struct.Struct("<8sHHIQ")
_CHECKSUM = struct.Struct("<Q")
PRELUDE_BYTES = _PRELUDE.size + _CHECKSUM.size

Buffer = bytes | bytearray | memoryview


def aligned(size: int) -> int:
    """Return ``size`` rounded up to the next multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encoding_id(codec: str, strata: Mapping[int, Sequence[Buffer]]) -> bytes:
    """Return the 16-byte id of one writing: a hash of the codec and all segments of all strata."""
    h = xxhash.xxh3_128(codec.encode())
    for stratum in sorted(strata):
        h.update(struct.pack("<II", stratum, len(strata[stratum])))
        for part in strata[stratum]:
            h.update(struct.pack("<QQ", len(part), xxhash.xxh3_64_intdigest(part)))
    return h.digest()


def encode_frame(
    header: FrameHeader,
    segments: Mapping[int, Buffer],
    attachments: Mapping[str, Buffer] | None = None,
) -> bytes:
    """Return the frame of ``segments`` (layer to bytes) under ``header``.

    The header's offset tables are filled in here; ``header`` itself is left alone.
    """
    full = FrameHeader()
    full.CopyFrom(header)
    del full.segments[:], full.attachments[:]
    parts: list[Buffer] = [segments[layer] for layer in sorted(segments)]
    for layer in sorted(segments):
        full.segments.add(
            layer=layer,
            offset=MAX_FRAME_BYTES,
            length=len(segments[layer]),
            checksum=xxhash.xxh3_64_intdigest(segments[layer]),
        )
    for name, part in sorted((attachments or {}).items()):
        full.attachments.add(
            name=name,
            offset=MAX_FRAME_BYTES,
            length=len(part),
            checksum=xxhash.xxh3_64_intdigest(part),
        )
        parts.append(part)
    # Offsets are varints: reserve room for the widest header, so that its length cannot shift them.
    cursor = aligned(PRELUDE_BYTES + full.ByteSize())
    frame_bytes = cursor
    entries: list[Segment | Attachment] = [*full.segments, *full.attachments]
    for entry in entries:
        entry.offset = cursor
        frame_bytes = cursor + entry.length
        cursor = aligned(frame_bytes)
    if frame_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {frame_bytes} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    head = full.SerializeToString(deterministic=True)
    prelude = _PRELUDE.pack(MAGIC, VERSION, 0, len(head), frame_bytes)
    frame = bytearray(frame_bytes)
    frame[: len(prelude)] = prelude
    _CHECKSUM.pack_into(frame, len(prelude), _head_checksum(prelude, head))
    frame[PRELUDE_BYTES : PRELUDE_BYTES + len(head)] = head
    for entry, part in zip(entries, parts, strict=True):
        frame[entry.offset : entry.offset + entry.length] = part
    return bytes(frame)


def draft_header(header: FrameHeader) -> FrameHeader:
    """Return what ``header`` says of the whole block, and nothing that its bytes decide."""
    draft = FrameHeader()
    draft.CopyFrom(header)
    for name in ("stratum", "encoding_id", "segments", "attachments"):
        draft.ClearField(name)
    return draft


def segment_checksum(data: Buffer) -> int:
    """Return the checksum of a segment or attachment, as in the offset table."""
    return xxhash.xxh3_64_intdigest(data)


def assemble_frame(head: Buffer, parts: Sequence[Buffer], max_bytes: int) -> bytes:
    """Return the frame of ``head`` and its segments and attachments, in the table's order.

    The same bytes as ``encode_frame`` made. Checksums of the parts are for the reader to verify.

    Raises:
        CorruptFrameError: ``head`` is not prelude and header alone, announces more than
            ``max_bytes``, or its table describes other parts.
    """
    header, frame_bytes, head_bytes = open_head(head)
    entries: list[Segment | Attachment] = [*header.segments, *header.attachments]
    if len(head) != head_bytes or frame_bytes > max_bytes:
        raise CorruptFrameError(f"{len(head)} bytes are no head of a frame within {max_bytes}")
    if [entry.length for entry in entries] != [len(part) for part in parts]:
        raise CorruptFrameError("the offset table describes other segments than came")
    frame = bytearray(frame_bytes)
    frame[:head_bytes] = head
    for entry, part in zip(entries, parts, strict=True):
        frame[entry.offset : entry.offset + entry.length] = part
    return bytes(frame)


def _head_checksum(prelude: Buffer, head: Buffer) -> int:
    h = xxhash.xxh3_64(prelude)
    h.update(head)
    return h.intdigest()


@dataclass(frozen=True, slots=True)
class Frame:
    """A verified header and a buffer that may hold only part of the segments.

    Attributes:
        header: The verified header.
        frame_bytes: Size of the whole frame.
        head_bytes: Size of prelude and header; a reader that has them can ask for any layers.
        first_byte: Offset within the frame at which ``payload`` starts.
        payload: A contiguous run of the frame's bytes; they stay what they are.
    """

    header: FrameHeader
    frame_bytes: int
    head_bytes: int
    first_byte: int
    payload: memoryview
    _verified: dict[int, memoryview] = field(init=False, default_factory=dict, compare=False)

    @classmethod
    def open(cls, buffer: Buffer, *, is_stored: bool = False) -> "Frame":
        """Return the frame in ``buffer``, header verified, segments not yet.

        Args:
            buffer: The frame.
            is_stored: Whether a store checked the offset table when it took the frame, or
                ``verify`` will, so that it need not be checked here; what points beyond the frame
                is found in any case.

        Raises:
            CorruptFrameError: Not a frame, another version, truncated, or the header's checksum is
                off.
        """
        header, frame_bytes, head_bytes = open_head(buffer, has_table_checked=is_stored)
        if len(buffer) != frame_bytes:
            raise CorruptFrameError(
                f"frame of {frame_bytes} bytes came as {len(buffer)}", "fetch it again"
            )
        return cls(header, frame_bytes, head_bytes, 0, memoryview(buffer).toreadonly())

    @classmethod
    def open_parts(cls, head: Buffer, first_byte: int, payload: Buffer) -> "Frame":
        """Return a frame of which only the head and the bytes from ``first_byte`` on are here."""
        header, frame_bytes, head_bytes = open_head(head)
        if first_byte < 0 or first_byte + len(payload) > frame_bytes:
            raise CorruptFrameError("a part lies outside its frame", "fetch it again")
        return cls(header, frame_bytes, head_bytes, first_byte, memoryview(payload).toreadonly())

    def segment(self, layer: int) -> memoryview:
        """Return the verified bytes of ``layer``.

        Raises:
            KeyError: The frame has no such layer, or this part of it does not hold it.
            CorruptFrameError: The checksum is off.
        """
        for entry in self.header.segments:
            if entry.layer == layer:
                return self._take(entry, f"layer {layer}")
        raise KeyError(f"no layer {layer} in this frame")

    def segments(self) -> dict[int, memoryview]:
        """Return every held layer's bytes, ascending, verified once; not to be changed."""
        if self._verified:
            return self._verified
        payload, first_byte = self.payload, self.first_byte
        size, digest = len(payload), xxhash.xxh3_64_intdigest
        found = {}
        for entry in self.header.segments:  # hot: 30 layers of each stratum of each block
            begin = entry.offset - first_byte
            end = begin + entry.length
            if begin >= 0 and end <= size:
                view = payload[begin:end]
                if digest(view) != entry.checksum:
                    raise _wrong_checksum(f"layer {entry.layer}")
                found[entry.layer] = view
            elif end + first_byte > self.frame_bytes:
                raise CorruptFrameError("the offset table points beyond the frame")
        self._verified.update(found)
        return self._verified

    def attachment(self, name: str) -> memoryview:
        """Return the verified bytes of an attachment; errors as for ``segment``."""
        for entry in self.header.attachments:
            if entry.name == name:
                return self._take(entry, name)
        raise KeyError(f"no attachment {name!r} in this frame")

    def verify(self) -> None:
        """Check every held segment and attachment; of a whole frame every byte.

        Raises:
            CorruptFrameError: A checksum is off, or bytes between the parts are not zero.
        """
        if self.first_byte == 0 and len(self.payload) == self.frame_bytes:
            self._verify_whole()
            return
        self.segments()
        for entry in self.header.attachments:
            if self._holds(entry):
                self._take(entry, entry.name)

    def _verify_whole(self) -> None:
        """Check table, checksums and padding in one pass, since attributes of entries cost most."""
        payload, frame_bytes, digest = self.payload, self.frame_bytes, xxhash.xxh3_64_intdigest
        cursor = self.head_bytes
        gaps = []
        for entries in (self.header.segments, self.header.attachments):
            for entry in entries:  # hot, as in ``segments``
                offset = entry.offset
                end = offset + entry.length
                if offset < cursor or offset % ALIGNMENT or end > frame_bytes:
                    _check_entry(cursor, offset, end, frame_bytes)  # which raises
                if digest(payload[offset:end]) != entry.checksum:
                    raise _wrong_checksum(_name_of(entry))
                if offset > cursor:
                    gaps.append(payload[cursor:offset])
                cursor = end
        if b"".join((*gaps, payload[cursor:])).strip(b"\0"):
            raise CorruptFrameError("bytes between segments are not zero", "fetch it again")

    def layer_run(self, first_layer: int, last_layer: int) -> tuple[int, int]:
        """Return the byte range of layers [first_layer, last_layer); (0, 0) if none."""
        wanted = [s for s in self.header.segments if first_layer <= s.layer < last_layer]
        if not wanted:
            return 0, 0
        return wanted[0].offset, wanted[-1].offset + wanted[-1].length

    def _holds(self, entry: Segment | Attachment) -> bool:
        begin = entry.offset - self.first_byte
        return begin >= 0 and begin + entry.length <= len(self.payload)

    def _take(self, entry: Segment | Attachment, what: str) -> memoryview:
        if not self._holds(entry):
            raise KeyError(f"{what} lies outside the part of the frame that is here")
        begin = entry.offset - self.first_byte
        view = self.payload[begin : begin + entry.length]
        if xxhash.xxh3_64_intdigest(view) != entry.checksum:
            raise _wrong_checksum(what)
        return view


def _wrong_checksum(what: str) -> CorruptFrameError:
    return CorruptFrameError(f"checksum of {what} does not hold", "fetch or compute it again")


def head_size(prefix: Buffer) -> int:
    """Return the size of prelude and header, read off the first 32 bytes of a frame.

    Raises:
        CorruptFrameError: Not a frame of this version.
    """
    if len(prefix) < PRELUDE_BYTES:
        raise CorruptFrameError(f"a frame has at least {PRELUDE_BYTES} bytes, got {len(prefix)}")
    magic, version, flags, head_length, frame_bytes = _PRELUDE.unpack_from(prefix)
    if magic != MAGIC:
        raise CorruptFrameError("not a frame: the magic bytes are wrong")
    if version != VERSION or flags:
        raise CorruptFrameError(
            f"frame version {version} flags {flags:#x}, this reader knows version {VERSION}",
            "use the same release on every node",
        )
    is_possible = head_length + PRELUDE_BYTES <= frame_bytes <= MAX_FRAME_BYTES
    if head_length > MAX_HEADER_BYTES or not is_possible:
        raise CorruptFrameError(f"impossible sizes: header {head_length}, frame {frame_bytes}")
    return PRELUDE_BYTES + int(head_length)


def open_head(buffer: Buffer, *, has_table_checked: bool = False) -> tuple[FrameHeader, int, int]:
    """Return the verified header, the frame's size and the head's size.

    Args:
        buffer: A frame, or the first bytes of one.
        has_table_checked: Leave the offset table unchecked.

    Raises:
        CorruptFrameError: As for ``Frame.open``.
    """
    head_bytes = head_size(buffer)
    if len(buffer) < head_bytes:
        raise CorruptFrameError(f"header of {head_bytes} bytes is cut at {len(buffer)}")
    view = memoryview(buffer)
    prelude, head = view[: _PRELUDE.size], bytes(view[PRELUDE_BYTES:head_bytes])
    if _CHECKSUM.unpack_from(buffer, _PRELUDE.size)[0] != _head_checksum(prelude, head):
        raise CorruptFrameError("checksum of the header does not hold", "fetch it again")
    try:
        header = FrameHeader.FromString(head)
    except DecodeError as error:
        raise CorruptFrameError(f"unreadable header: {error}") from error
    frame_bytes = int(_PRELUDE.unpack_from(buffer)[4])
    if not has_table_checked:
        _check_table(header, head_bytes, frame_bytes)
    return header, frame_bytes, head_bytes


def under_scope(frame: Buffer, old: bytes, new: bytes) -> bytes:
    """Return the same frame with scope ``new`` in its header; segments are copied unread.

    Raises:
        CorruptFrameError: Not a frame of scope ``old``, or its header is not as we write it.
    """
    header, _, head_bytes = open_head(frame)
    if header.scope != old:
        raise CorruptFrameError("the frame belongs to another scope")
    header.scope = new
    head = header.SerializeToString(deterministic=True)
    if PRELUDE_BYTES + len(head) != head_bytes:
        raise CorruptFrameError(
            "the header is not in canonical form", "encode it with this release"
        )
    view = memoryview(frame)
    prelude = view[: _PRELUDE.size]
    checksum = _CHECKSUM.pack(_head_checksum(prelude, head))
    return b"".join((prelude, checksum, head, view[head_bytes:]))


def _check_table(header: FrameHeader, head_bytes: int, frame_bytes: int) -> None:
    """Raise unless the entries are aligned, in ascending order and within the frame."""
    cursor = head_bytes
    for entries in (header.segments, header.attachments):
        for entry in entries:  # hot, as in ``segments``
            end = entry.offset + entry.length
            _check_entry(cursor, entry.offset, end, frame_bytes)
            cursor = end


def _check_entry(cursor: int, offset: int, end: int, frame_bytes: int) -> None:
    if offset < cursor or offset % ALIGNMENT:
        raise CorruptFrameError("the offset table does not describe this frame")
    if end > frame_bytes:
        raise CorruptFrameError("the offset table points beyond the frame")


def _name_of(entry: Segment | Attachment) -> str:
    return f"layer {entry.layer}" if isinstance(entry, Segment) else entry.name


def stratum_name(stratum: int) -> str:
    """Return "base", "mid", "fine" or "exact"; of one that nobody knows its number."""
    if stratum not in Stratum.values():
        return str(stratum)
    return Stratum.Name(Stratum.ValueType(stratum)).removeprefix("STRATUM_").lower()
