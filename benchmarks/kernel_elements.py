"""Contests of the ops without calibration: planes, the fallback codec, bytes, RoPE, column sums."""

from collections.abc import Iterator

import torch
from kernel_peers import peer_entries
from kernel_rounds import MEMCPY, Contest, Entry
from kernel_shapes import BLOCKS, Shape, opened, saliency

from kvstrata.kernels.byte_planes import (
    merge_bytes,
    merge_bytes_reference,
    split_bytes,
    split_bytes_reference,
)
from kvstrata.kernels.colsum import column_sums, column_sums_reference
from kvstrata.kernels.nested_block import (
    decode_blocks,
    decode_blocks_reference,
    encode_blocks,
    encode_blocks_reference,
)
from kvstrata.kernels.nested_layout import NestedLayout
from kvstrata.kernels.planes import unpack_planar, unpack_planar_reference
from kvstrata.kernels.rope import rotate, rotate_reference
from kvstrata.kernels.saliency import probe_rows
from kvstrata.methods import BlockShape, FallbackCodec, KVBlocks
from kvstrata.protos.identity import BLOCK_TOKENS


def _label(shape: Shape, blocks: int) -> str:
    return f"{shape.name} L{shape.layers} H{shape.kv_heads} D{shape.dim} N{blocks}"


def unpack(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield one contest per width: a block's codes of one head are a row, as codecs store them."""
    rows, codes = shape.layers * shape.kv_heads * blocks, BLOCK_TOKENS * shape.dim
    for bits in (1, 2, 4):
        packed = torch.randint(0, 256, (rows, codes * bits // 8), dtype=torch.uint8)
        yield Contest(
            "unpack",
            f"{shape.name} {bits} bit, {rows} rows of {codes}",
            [
                Entry(
                    "ours",
                    lambda p=packed, b=bits: unpack_planar(p, b, torch.bfloat16),
                    2 * rows * codes,
                    is_ours=True,
                ),
                Entry(
                    "eager torch",
                    lambda p=packed, b=bits: unpack_planar_reference(p, b, torch.bfloat16),
                    2 * rows * codes,
                ),
            ],
        )


def fallback(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield `encode-fallback`, then `decode-fallback`; the reference gets one layer."""
    keys, values = shape.tokens(blocks=blocks), shape.tokens(blocks=blocks)
    few = [tensor[:1] for tensor in (keys, values)]
    size, small = 2 * keys.nbytes, 2 * few[0].nbytes
    peers_in, peers_out = peer_entries(shape, blocks)
    codec, kv = FallbackCodec(), KVBlocks(keys, values, saliency(shape, blocks), 0)
    yield Contest(
        "encode-fallback",
        _label(shape, blocks),
        [
            Entry("ours", lambda: encode_blocks(keys, values), size, is_ours=True),
            Entry("ours, segments", lambda: codec.encode(kv), size, is_ours=True),
            Entry("eager torch", lambda: encode_blocks_reference(*few), small),
            *peers_in,
        ],
    )
    base, mid = encode_blocks(keys, values)
    rows = [list(records.numpy()) for records in (base, mid)]
    one_layer = base[:, :1], mid[:, :1]
    layout, what = NestedLayout.of(shape.kv_heads, shape.dim), torch.bfloat16
    frames = opened(codec.encode(kv))
    block = BlockShape(shape.kv_heads, shape.dim, what)
    yield Contest(
        "decode-fallback",
        _label(shape, blocks),
        [
            Entry("ours", lambda: decode_blocks(*rows, layout, what), size, is_ours=True),
            Entry(
                "ours, base", lambda: decode_blocks(rows[0], None, layout, what), size, is_ours=True
            ),
            Entry("ours, frames", lambda: codec.decode(frames, block), size, is_ours=True),
            Entry(
                "eager torch",
                lambda: [side.to(what) for side in decode_blocks_reference(*one_layer, layout)],
                small,
            ),
            *peers_out,
        ],
    )


def byte_planes(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield `split-bytes`, then `merge-bytes`, of the keys."""
    keys = shape.tokens(blocks=blocks)
    planes, flat = split_bytes(keys), keys.flatten()
    for op, ours, eager in (
        ("split-bytes", lambda: split_bytes(keys), lambda: split_bytes_reference(flat)),
        (
            "merge-bytes",
            lambda: merge_bytes(planes, torch.bfloat16),
            lambda: merge_bytes_reference(planes, torch.bfloat16),
        ),
    ):
        yield Contest(
            op,
            _label(shape, blocks),
            [
                Entry("ours", ours, keys.nbytes, is_ours=True),
                Entry("eager torch", eager, keys.nbytes),
            ],
        )


def rope(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield `rope` of the keys."""
    keys = shape.tokens(blocks=blocks).flatten(2, 3).flatten(0, 1)
    angles = torch.rand(blocks * BLOCK_TOKENS, shape.dim // 2).repeat(1, 2)
    cos, sin, out = angles.cos(), angles.sin(), torch.empty_like(keys)
    yield Contest(
        "rope",
        _label(shape, blocks),
        [
            Entry("ours", lambda: rotate(keys, cos, sin), keys.nbytes, is_ours=True),
            Entry(
                "eager torch",
                lambda: rotate_reference(keys, cos, sin, None, inverse=False, out=out),
                keys.nbytes,
            ),
        ],
    )


def colsum(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield `colsum` of one prompt; its limit is memcpy or the product of queries and keys."""
    keys = shape.tokens(blocks=blocks).flatten(2, 3)
    rows = probe_rows(keys.shape[2])
    queries = torch.randn(shape.layers, shape.heads, rows.numel(), shape.dim).bfloat16()
    grouped = queries.reshape(shape.layers, shape.kv_heads, -1, shape.dim)
    scores = queries.new_empty((shape.kv_heads, grouped.shape[2], keys.shape[2]))
    scaling, limits = shape.dim**-0.5, (MEMCPY, "matmul")

    def product() -> None:
        for layer in range(shape.layers):
            torch.bmm(grouped[layer], keys[layer].mT, out=scores)

    yield Contest(
        "colsum",
        f"{_label(shape, blocks)}, {rows.numel()} rows of {shape.heads} heads",
        [
            Entry("matmul", product, keys.nbytes),
            Entry(
                "ours",
                lambda: column_sums(queries, keys, rows, scaling),
                keys.nbytes,
                limits,
                is_ours=True,
            ),
            Entry(
                "eager torch",
                lambda: column_sums_reference(queries[:2], keys[:2], rows, scaling),
                keys[:2].nbytes,
                limits,
            ),
        ],
    )
