"""Which of an op's versions runs, given the device of its tensors and what is installed."""

import importlib.util
from functools import cache
from typing import Literal

import torch

Backend = Literal["numba", "triton", "reference"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what ops take


@cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def backend_of(*tensors: torch.Tensor) -> Backend:
    """Return the version to run for tensors that lie on one device.

    Raises:
        ValueError: They lie on several devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")
    kind = devices.pop().type
    if kind == "cpu" and _is_installed("numba"):
        return "numba"
    if kind == "cuda" and _is_installed("triton"):
        return "triton"
    return "reference"
