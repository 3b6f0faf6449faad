"""Contests of the calibrated codec's kernels: `encode` and `decode`.

One call serves K and V of all layers, as ``CalibratedCodec`` does. The limit is the slower of
memcpy and the codec's product with its matrices as ``torch.bmm`` does it in bf16, of the components
that have bits: for keys and values read with their mid planes, those that they refine, too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from kernel_peers import peer_entries
from kernel_rounds import MEMCPY, Contest, Entry
from kernel_shapes import (
    BLOCKS,
    ESCAPE_SHARE,
    KEY_DECAY,
    MID_SHARE,
    THRESHOLD,
    VALUE_DECAY,
    Shape,
    opened,
    profile,
    saliency,
    tables,
    tokens_of,
)

from kvstrata.kernels.block_planes import MidRows, PlaneLayout, encode_block_planes_reference
from kvstrata.kernels.component_basis import (
    ComponentBasis,
    encode_tokens,
    expand,
    expand_reference,
    to_components,
)
from kvstrata.kernels.escape_rows import EscapeRows, pack_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.token_masks import TokenClasses, to_mask, token_classes
from kvstrata.kernels.value_bias import ValueBias, encode_value_bias
from kvstrata.methods import BlockShape, KVBlocks
from kvstrata.methods.bit_allocation import VALUE_WEIGHT, allocate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.profile import SideTables


@dataclass(frozen=True)
class Stored:
    """What one side's encoding gives."""

    words: torch.Tensor
    mid: MidRows
    escapes: EscapeRows
    bias: ValueBias | None


class Side:
    """K or V of some layers: tokens, tables, and which token is of which class."""

    def __init__(self, name: str, made: SideTables, blocks: int = BLOCKS) -> None:
        self.name = name
        bits = allocate(made, THRESHOLD, weight=1.0 if name == "K" else VALUE_WEIGHT)
        inverse = made.basis.flatten(0, 1).float()
        self.variance = made.variance.flatten(0, 1)
        self.layout = PlaneLayout(bits.widths.flatten(0, 1), bits.mid_counts.flatten())
        self.basis = ComponentBasis(
            self.layout,
            made.mean.flatten(0, 1),
            torch.linalg.inv(inverse),
            inverse,
            self.variance.sqrt(),
        )
        self.tokens = tokens_of(made, blocks).flatten(0, 1)
        escaped = torch.rand(self.tokens.shape[:3]) < ESCAPE_SHARE[name]
        mid = (torch.rand(self.tokens.shape[:3]) < MID_SHARE[name]) & ~escaped
        self.classes: TokenClasses = token_classes(to_mask(mid), to_mask(escaped))
        self.weights = torch.rand(self.tokens.shape[:3])

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens in bf16."""
        return self.tokens.numel() * 2

    def encode(self) -> Stored:
        """Return everything that a block stores of this side."""
        y, words, _ = encode_tokens(self.tokens, self.basis, self.variance)
        bias = None
        if self.name == "V":
            bias = encode_value_bias(
                y,
                words,
                self.layout,
                weights=self.weights,
                base=self.classes.base,
                deviation=self.basis.deviation,
            )
        return Stored(
            words,
            pack_mid_rows(y, self.classes.mid, self.layout),
            pack_escape_rows(self.tokens, self.classes.escape),
            bias,
        )

    def encode_eager(self) -> object:
        """Return words and errors by the torch reference; no mid rows, escapes and bias."""
        y = to_components(self.tokens, self.basis)
        return encode_block_planes_reference(y, self.layout, self.variance)

    def decode(
        self,
        stored: Stored,
        *,
        refined: bool = True,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the tokens."""
        return expand(
            stored.words,
            self.basis,
            self.classes,
            mid=stored.mid if refined else None,
            bias=stored.bias,
            escapes=stored.escapes,
            rotation=rotation,
        )

    def decode_eager(self, stored: Stored) -> torch.Tensor:
        """Return the tokens by the torch reference, which gives no bias back."""
        out = torch.empty_like(self.tokens)
        expand_reference(
            stored.words, self.basis, self.classes, stored.mid, None, stored.escapes, None, out
        )
        return out

    def product(self, *, forward: bool, refined: bool = True) -> Callable[[], object]:
        """Return the bare product of the components that have bits."""
        kept, dim = self.layout.num_kept(refined=refined), self.layout.dim
        flat = self.tokens.flatten(1, 2)
        if forward:
            matrix = self.basis.forward[:, :, :kept].bfloat16().contiguous()
            out = flat.new_empty((*flat.shape[:2], kept))
        else:
            flat = flat[:, :, :kept].contiguous()
            matrix = self.basis.inverse[:, :kept].bfloat16().contiguous()
            out = flat.new_empty((*flat.shape[:2], dim))
        return lambda: torch.bmm(flat, matrix, out=out)


def contests(shape: Shape, blocks: int = BLOCKS) -> Iterator[Contest]:
    """Yield `encode`, then `decode`."""
    made = profile(shape)
    sides = (Side("K", made.keys["pre"], blocks), Side("V", made.values, blocks))
    # The reference takes seconds for a megabyte, so it gets an eighth of one layer.
    part = max(1, blocks // 8)
    few = (
        Side("K", tables(shape, KEY_DECAY, 1), part),
        Side("V", tables(shape, VALUE_DECAY, 1), part),
    )
    size, small = (sum(side.num_bytes for side in both) for both in (sides, few))
    label = f"{shape.name} L{shape.layers} H{shape.kv_heads} D{shape.dim} N{blocks}"
    peers_in, peers_out = peer_entries(shape, blocks)
    codec = CalibratedCodec(made, THRESHOLD)
    kv = KVBlocks(
        *(side.tokens.unflatten(0, (shape.layers, -1)) for side in sides),
        saliency(shape, blocks),
        0,
    )
    limits = (MEMCPY, "matmul")
    yield Contest(
        "encode",
        label,
        [
            Entry("matmul", _all([side.product(forward=True) for side in sides]), size),
            Entry("ours", _all([side.encode for side in sides]), size, limits, is_ours=True),
            Entry("ours, segments", lambda: codec.encode(kv), size, limits, is_ours=True),
            Entry("eager torch", _all([side.encode_eager for side in few]), small, limits),
            *peers_in,
        ],
    )
    stored, stored_few = ([side.encode() for side in both] for both in (sides, few))
    frames = opened(codec.encode(kv))
    what = BlockShape(shape.kv_heads, shape.dim, torch.bfloat16)
    table = torch.rand(blocks * 64, shape.dim)
    read = [partial(s.decode, one) for s, one in zip(sides, stored, strict=True)]
    turned = [partial(read[0], rotation=(table, table)), read[1]]
    base = [partial(call, refined=False) for call in read]
    yield Contest(
        "decode",
        label,
        [
            Entry("matmul", _all([side.product(forward=False) for side in sides]), size),
            Entry(
                "matmul, base",
                _all([side.product(forward=False, refined=False) for side in sides]),
                size,
            ),
            Entry("ours", _all(read), size, limits, is_ours=True),
            Entry("ours, with RoPE", _all(turned), size, limits, is_ours=True),
            Entry("ours, base", _all(base), size, (MEMCPY, "matmul, base"), is_ours=True),
            Entry("ours, frames", lambda: codec.decode(frames, what), size, limits, is_ours=True),
            Entry(
                "eager torch",
                _all([partial(s.decode_eager, o) for s, o in zip(few, stored_few, strict=True)]),
                small,
                limits,
            ),
            *peers_out,
        ],
    )


def _all(calls: list[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run
