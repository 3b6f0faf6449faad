"""Where the fields of a nested block's records lie.

Legend: H KV heads, T block tokens (64), D head_dim, U units of 16 tokens (4).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from kvstrata.kernels.quantize import LEVELS_PER_SIGMA

TOKENS = 64
UNIT = 16
Rows = np.ndarray[Any, np.dtype[np.uint8]]


class NestedLayout(NamedTuple):
    """Offsets in bytes of the fields of one layer's records; fields lie densely in this order.

    BASE record::

        fp16   minimum  H x D      fp16 step H x D          (keys)
        fp16   peak     H          uint8 scale H x T        (values)
        uint8  keys     H x T*D/4  uint8 values H x T*D/4   (2 bits of each code)

    MID record::

        uint8  keys     H x T*D/4  uint8 last bits H x T*D/8   uint8 values H x T*D/4

    Codes of one head are packed as one row (``pack_planar``), keys in the order (T, D), values in
    the order (U, size, 16, D/size), ``size`` being the largest power of two that divides D: token
    16u + r, channel g * size + s is element ((u * size + s) * 16 + r) * (D/size) + g.
    """

    heads: int
    dim: int
    scales: int
    keys: int
    values: int
    base_bytes: int
    mid_bits: int
    mid_values: int
    mid_bytes: int

    @classmethod
    def of(cls, heads: int, dim: int) -> "NestedLayout":
        """Return the layout of ``heads`` KV heads.

        Raises:
            ValueError: ``dim`` is no multiple of 8 or above 256, or there is no head.
        """
        if heads < 1 or dim % 8 or not 8 <= dim <= 256:
            raise ValueError(
                f"head_dim must be a multiple of 8 up to 256, with a head at least; got {heads} "
                f"heads of {dim}"
            )
        pairs = heads * TOKENS * dim // 4
        scales = 4 * heads * dim + 2 * heads
        keys = scales + heads * TOKENS
        return cls(
            heads=heads,
            dim=dim,
            scales=scales,
            keys=keys,
            values=keys + pairs,
            base_bytes=keys + 2 * pairs,
            mid_bits=pairs,
            mid_values=pairs + pairs // 2,
            mid_bytes=2 * pairs + pairs // 2,
        )

    @property
    def unit(self) -> float:
        """What makes the transform of sums and differences orthonormal."""
        return 1 / math.sqrt(self.dim & -self.dim)

    @property
    def norm(self) -> float:
        """What a transform of levels is multiplied by, besides its token's scale."""
        return self.unit / LEVELS_PER_SIGMA
