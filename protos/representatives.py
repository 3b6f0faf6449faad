"""What stands for a block when blocks are searched: its mean key per layer, an attachment.

ReKV (arXiv 2503.00540): the representative of a block is the mean over its tokens of the keys
before RoPE. It is kept per KV head; a query of more heads is summed within each group first, which
gives the same dot products as repeating the representative for every query head.

The attachment ``representatives`` belongs to the frame that a reader cannot do without, BASE or
EXACT. Little-endian::

    offset   size    field
    0        4       number of layers N
    4        4 N     layers, ascending
    4 + 4 N  2 N W   float16 rows, one a layer, of W = num_kv_heads * head_dim values

A layer whose mean key is beyond float16 or no number is left out.
"""

import struct
from collections.abc import Mapping

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer, Frame

ATTACHMENT = "representatives"
VALUE_BYTES = 2
MAX_LAYERS = 4096


def pack_representatives(rows: Mapping[int, Buffer]) -> bytes:
    """Return the attachment of float16 ``rows``, layer to bytes; all rows are of one length."""
    layers = sorted(rows)
    if len({len(row) for row in rows.values()}) > 1:
        raise ValueError("representatives of one block have one length")
    head = struct.pack(f"<{1 + len(layers)}I", len(layers), *layers)
    return b"".join((head, *(rows[layer] for layer in layers)))


def unpack_representatives(frame: Frame) -> dict[int, memoryview]:
    """Return each layer's float16 row, verified; empty for a frame without the attachment.

    Raises:
        CorruptFrameError: The checksum is off, or the sizes are not those of the frame's model.
    """
    if all(entry.name != ATTACHMENT for entry in frame.header.attachments):
        return {}
    data = frame.attachment(ATTACHMENT)
    row_bytes = VALUE_BYTES * frame.header.num_kv_heads * frame.header.head_dim
    count = int.from_bytes(data[:4], "little")
    first = 4 + 4 * count
    if len(data) < 4 or count > MAX_LAYERS or len(data) != first + count * row_bytes:
        raise CorruptFrameError(
            f"{len(data)} bytes are no {count} representatives of {row_bytes} bytes",
            "compute the block again",
        )
    layers = struct.unpack_from(f"<{count}I", data, 4)
    if list(layers) != sorted(set(layers)):
        raise CorruptFrameError("representatives are not in ascending layers", "compute it again")
    return {
        layer: data[first + i * row_bytes : first + (i + 1) * row_bytes]
        for i, layer in enumerate(layers)
    }
