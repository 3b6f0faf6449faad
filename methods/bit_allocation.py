"""Who gets which bits: one threshold decides over components, and over tokens.

A threshold t is a price per stored bit. A component gets another plane while that lowers the
expected cost by more than t per element; a token gets its two further planes, or becomes an
escape, if what it loses otherwise, times how much it is attended, is worth their bits. So texts
that quantise badly get more bits, and quality stays even.

Legend: L stored layers, H KV heads, D head_dim.
"""

import itertools
from dataclasses import dataclass

import torch

from kvstrata.methods.profile import SideTables

VALUE_WEIGHT = 2.0  # V errors add up over tokens, K errors partly cancel in the softmax
ESCAPE_BITS_PER_ELEMENT = 8
ESCAPE_SCALE_BITS = 16
MID_PLANES = 2
MID_MULTIPLE = 8
# Of a token's error, about this share remains with the two further planes.
MID_REMAINDER = 0.2
# Mid tokens weigh several times the mean, so they refine smaller components, too.
MID_REACH = 16.0
# Mean squared error of a unit Gaussian with 0 to 6 planes, and of a refined plane-less component.
DISTORTION = (1.0, 0.363380, 0.117482, 0.036943, 0.011411, 0.003464, 0.001033)
FINE_DISTORTION = 0.117482
# Price of a bit for one token against one for all tokens, tuned on development texts at 2.1 bits:
# .06, .2, .5 and 1.2 gave KL .0026, .0034, .0047 and .0057, and planted facts lost .25, .18, .10
# and .11 in log P. Cheap tokens help what is read often, planes for all what is read once.
TOKEN_PRICE = 0.5


@dataclass(frozen=True)
class SideAllocation:
    """The bits of K or of V under one threshold.

    Attributes:
        widths: uint8 (L, H, D), not increasing along D.
        mid_counts: int64 (L, H), components that mid rows refine.
        mid_price: float32 (L, H): a token with a larger weighted error becomes mid.
        escape_price: float32 (L, H): and with a still larger one an escape.
    """

    widths: torch.Tensor
    mid_counts: torch.Tensor
    mid_price: torch.Tensor
    escape_price: torch.Tensor

    @property
    def mean_width(self) -> float:
        """Base bits per element."""
        return self.widths.float().mean().item()


def allocate(tables: SideTables, threshold: float, *, weight: float = 1.0) -> SideAllocation:
    """Return the bits of one side.

    Args:
        tables: Of the side.
        threshold: Price of a bit, in the units of ``tables.variance``.
        weight: Of the side's components; ``VALUE_WEIGHT`` for V.

    Raises:
        ValueError: The threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, not {threshold}")
    cost = tables.variance.double() * weight
    widths = torch.zeros(cost.shape, dtype=torch.uint8)
    for coarse, fine in itertools.pairwise(DISTORTION):
        widths += cost * (coarse - fine) > threshold
    refined = (cost * (1 - FINE_DISTORTION) * MID_REACH > MID_PLANES * threshold).sum(-1)
    dim = widths.shape[-1]
    counts = ((refined + MID_MULTIPLE - 1) // MID_MULTIPLE * MID_MULTIPLE).clamp(
        MID_MULTIPLE, dim // MID_MULTIPLE * MID_MULTIPLE
    )
    mid_bits = (MID_PLANES * counts).double()
    escape_bits = dim * ESCAPE_BITS_PER_ELEMENT + ESCAPE_SCALE_BITS
    price = TOKEN_PRICE * threshold
    return SideAllocation(
        widths=widths,
        mid_counts=counts,
        mid_price=(price * mid_bits / (1 - MID_REMAINDER)).float(),
        escape_price=(price * (escape_bits - mid_bits) / MID_REMAINDER).float(),
    )
