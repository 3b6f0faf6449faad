"""Fresh memory in huge pages: first writes to 4 KiB pages cost more than decoding into them."""

import ctypes
import mmap

import torch

_LEAST_BYTES = 1 << 22


def empty_huge(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return ``torch.empty``; on a CPU and from 4 MiB on in huge pages, where the system has them.

    The advice changes nothing but speed, so nothing depends on whether the system takes it.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= _LEAST_BYTES:
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is not None:
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = tensor.data_ptr() + tensor.nbytes - first
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return tensor
