"""Putting frames, or some layers of them, together from the pieces of a Get stream."""

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import MAX_FRAME_BYTES, Buffer, Frame
from kvstrata.protos.identity import BlockHash, ScopeDigest


class FrameAssembly:
    """The pieces of one stratum as they arrive: a run from the head on, then maybe another run.

    A frame of one piece is used as it came; others are joined once. Never holds more than was
    announced.

    Args:
        frame_bytes: Announced size of the whole frame.
        max_frame_bytes: Largest size to accept.
    """

    def __init__(self, frame_bytes: int, max_frame_bytes: int) -> None:
        if not 0 < frame_bytes <= min(max_frame_bytes, MAX_FRAME_BYTES):
            raise CorruptFrameError(f"a frame of {frame_bytes} bytes was announced")
        self.num_bytes = 0
        self._frame_bytes = frame_bytes
        self._next_offset = 0
        self._runs: list[tuple[int, list[Buffer]]] = [(0, [])]

    def add(self, offset: int, data: Buffer) -> None:
        """Take the bytes at ``offset`` of the frame; pieces come in ascending order."""
        if offset < self._next_offset or offset + len(data) > self._frame_bytes:
            raise CorruptFrameError(f"{len(data)} bytes at {offset} lie outside their frame")
        if offset > self._next_offset:
            self._runs.append((offset, []))
        if len(self._runs) > 2:
            raise CorruptFrameError("a frame came in more than two runs")
        self._runs[-1][1].append(data)
        self._next_offset = offset + len(data)
        self.num_bytes += len(data)

    def finish(self, scope: ScopeDigest, block_hash: BlockHash, stratum: int) -> Frame:
        """Return the frame, its header verified to be that of ``stratum`` of the block.

        Raises:
            CorruptFrameError: It is not.
        """
        (_, head), (first_byte, payload) = self._runs[0], self._runs[-1]
        if len(self._runs) == 1 and self.num_bytes == self._frame_bytes:
            frame = Frame.open(_join(head), is_stored=True)
        else:
            joined = _join(head)
            body = joined if len(self._runs) == 1 else _join(payload)
            frame = Frame.open_parts(joined, first_byte, body)
        header = frame.header
        if (header.scope, header.block_hash, header.stratum) != (scope, block_hash, stratum):
            raise CorruptFrameError(
                "the frame belongs to another block", "fetch or compute it again"
            )
        if frame.frame_bytes != self._frame_bytes:
            raise CorruptFrameError("the frame has another size than was announced")
        return frame


def _join(parts: list[Buffer]) -> Buffer:
    return parts[0] if len(parts) == 1 else b"".join(parts)
