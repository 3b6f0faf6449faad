"""The orthonormal Hadamard transform along the head dimension.

Head dimensions that are no power of two (80, 96) get one block per largest power-of-two divisor.
``turn`` takes sums and differences in a stated order, so it gives the same bits on every machine; a
product with the matrix equals it up to rounding.
"""

import math
from functools import cache

import torch


@cache
def hadamard(dim: int) -> torch.Tensor:
    """Return the symmetric orthonormal float32 matrix H, (dim, dim), with H @ H = identity."""
    size = dim & -dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    blocks: torch.Tensor = torch.block_diag(*[block] * (dim // size))
    return blocks / math.sqrt(size)


def turn(values: torch.Tensor, *, scaled: bool = True) -> torch.Tensor:
    """Return float32 (..., D) ``values @ hadamard(D)``: neighbours are added first, halves last.

    Without ``scaled`` the sums and differences alone, ``sqrt(size)`` times as large.
    """
    size = values.shape[-1] & -values.shape[-1]
    turned = values
    step = 1
    while step < size:
        pairs = turned.unflatten(-1, (-1, 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        turned = torch.stack([low + high, low - high], -2).flatten(-3)
        step *= 2
    if not scaled:
        return turned
    return turned * torch.tensor(1 / math.sqrt(size), device=values.device)
