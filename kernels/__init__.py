"""Numerics of the codec: packing, transforms, quantisers.

Each op is one function that dispatches on the tensors' device: a readable torch reference, a Numba
kernel for CPUs and a Triton kernel for GPUs.
"""

from kvstrata.kernels.byte_planes import merge_bytes, split_bytes
from kvstrata.kernels.component_basis import encode_tokens, expand
from kvstrata.kernels.planes import pack_planar, unpack_planar
from kvstrata.kernels.rope import rotate
from kvstrata.kernels.saliency import normalised_saliency

__version__ = "0.0.0"  # read by transformers when a bare `kernels` is looked up from a checkout

__all__ = [
    "encode_tokens",
    "expand",
    "merge_bytes",
    "normalised_saliency",
    "pack_planar",
    "rotate",
    "split_bytes",
    "unpack_planar",
]
