"""The segments of one stratum as they arrive on a Write or Attach stream."""

from dataclasses import dataclass

from kvstrata.protos.errors import CorruptFrameError, LimitError, MalformedMessageError
from kvstrata.protos.frame import segment_checksum
from kvstrata.protos.kvstore_pb2 import LayerSegment

MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """One layer's bytes in one stratum of a block, verified.

    Attributes:
        stratum: Which one.
        layer: Of the model.
        checksum: XXH3-64 of ``data``.
        data: The bytes.
    """

    stratum: int
    layer: int
    checksum: int
    data: bytes


class SegmentAssembly:
    """Puts parts together to segments. Holds one segment, never more than ``max_bytes`` in all.

    Args:
        max_bytes: Bound on the bytes of all segments.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes
        self._first: LayerSegment | None = None
        self._parts: list[bytes] = []
        self._last_layer = -1

    @property
    def is_between_segments(self) -> bool:
        """Whether every segment that began has come whole."""
        return self._first is None

    def add(self, part: LayerSegment) -> StoredSegment | None:
        """Take the next part and return the segment once it is whole.

        Raises:
            MalformedMessageError: Layers that do not ascend, a part of another segment than the one
                that is under way, or more bytes than it was to have.
            LimitError: More bytes than the stratum may take.
            CorruptFrameError: The checksum does not hold.
        """
        first = self._first
        if first is None:
            self._begin(part)
        elif (part.layer, part.length, part.checksum) != (
            first.layer,
            first.length,
            first.checksum,
        ):
            raise MalformedMessageError(
                f"layer {part.layer} came before layer {first.layer} was whole"
            )
        elif not part.data:
            raise MalformedMessageError("a part of a segment without bytes")
        self._parts.append(part.data)
        missing = part.length - sum(map(len, self._parts))
        if missing < 0:
            raise MalformedMessageError(f"layer {part.layer} came longer than announced")
        if missing:
            return None
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._first, self._parts = None, []
        if segment_checksum(data) != part.checksum:
            raise CorruptFrameError(f"checksum of layer {part.layer} does not hold")
        return StoredSegment(int(part.stratum), part.layer, part.checksum, data)

    def _begin(self, part: LayerSegment) -> None:
        if not self._last_layer < part.layer < MAX_LAYERS:
            raise MalformedMessageError(
                f"layer {part.layer} came after layer {self._last_layer}",
                f"send ascending layers below {MAX_LAYERS}",
            )
        if part.length and not part.data:
            raise MalformedMessageError("a part of a segment without bytes")
        if part.length > self._left_bytes:
            raise LimitError(
                f"layer {part.layer} of {part.length} bytes exceeds what the block may still take, "
                f"{self._left_bytes} bytes",
                "declare the frames' largest sizes when opening a block",
            )
        self._last_layer = part.layer
        self._left_bytes -= part.length
        self._first = part
