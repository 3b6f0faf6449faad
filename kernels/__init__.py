"""Numerics of the codec: packing, transforms, quantisers.

Each op is a readable torch reference here; Triton and Numba versions join it beside the reference.
"""

from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.planes import merge_bytes, pack_planar, split_bytes, unpack_planar

__version__ = "0.0.0"  # read by transformers when a bare `kernels` is looked up from a checkout

__all__ = ["hadamard", "merge_bytes", "pack_planar", "split_bytes", "unpack_planar"]
