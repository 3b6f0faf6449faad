"""The orthonormal Hadamard transform along the head dimension, as a matrix.

Head dimensions that are no power of two (80, 96) get one block per largest power-of-two divisor.
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
