"""A stand-in for a GPU: tensors that say they are on ``cuda:0`` and are refused where CUDA would.

Memory and arithmetic are the CPU's; what differs is what a forgotten ``device=`` runs into. An
operation over tensors of both devices raises, as do ``numpy()`` and a Triton kernel that is given
host memory. Kernels run in Triton's interpreter. What crosses over is counted by direction: a copy
to the host, a number read or a shape that depends on values waits for the device.

It shows nothing of time, of streams, or of how a kernel computes on a real GPU.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import GridExecutor

DEVICE = torch.device("cuda:0")
_aten = torch.ops.aten
_MIXING = {"aten::copy_", "aten::_to_copy", "aten::to"}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten._unique2.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}

_one_at_a_time = threading.Lock()  # the interpreter knows of one grid
crossings: Counter[str] = Counter()  # "to device", "to host", "waits"


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in; ``inner`` is its content."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        assert type(inner) is torch.Tensor, type(inner)
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> torch.Tensor:
        _check_index(index)
        return DeviceTensor(self.inner[_content(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        _check_index(index)
        if isinstance(value, torch.Tensor) and value.ndim and not isinstance(value, DeviceTensor):
            crossings["to device"] += 1  # plain indices make it a copy; others are refused
            if any(isinstance(part, torch.Tensor) for part in tree_flatten(index)[0]):
                raise RuntimeError("Expected all tensors to be on the same device (index_put)")
        self.inner[_content(index)] = _content(value)

    def contiguous(self, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return self if self.inner.is_contiguous() else DeviceTensor(self.inner.contiguous())

    def cpu(self, **_: Any) -> torch.Tensor:  # type: ignore[override]
        crossings["to host"] += 1
        return self.inner.clone()

    def copy_(self, source: torch.Tensor, **_: Any) -> Self:  # type: ignore[override]
        crossings["to device"] += not isinstance(source, DeviceTensor)
        self.inner.copy_(_content(source))
        return self

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def item(self) -> Any:
        crossings["waits"] += 1
        return self.inner.item()

    def tolist(self) -> Any:
        crossings["to host"] += 1
        return self.inner.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner!r})"


def _content(tree: Any) -> Any:
    def content(part: Any) -> Any:
        if isinstance(part, torch.device):
            return torch.device("cpu") if part.type == DEVICE.type else part
        return part.inner if isinstance(part, DeviceTensor) else part

    return tree_map(content, tree)


def _check_index(index: Any) -> None:
    for part in tree_flatten(index)[0]:
        if isinstance(part, torch.Tensor) and not isinstance(part, DeviceTensor):
            crossings["to device"] += 1  # CUDA takes indices from the host, and copies them
        if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            crossings["waits"] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    ours = [part for part in tensors if isinstance(part, DeviceTensor)]
    named = [d for d in tree_flatten((args, kwargs))[0] if isinstance(d, torch.device)]
    to_us = named[0].type == DEVICE.type if named else bool(ours)
    hosts = [part for part in tensors if not isinstance(part, DeviceTensor)]
    name = func._schema.name
    if name in _MIXING:
        is_ours = bool(ours)
        if name == "aten::copy_":
            to_us, is_ours = (isinstance(part, DeviceTensor) for part in args[:2])
        if is_ours != to_us:
            crossings["to device" if to_us else "to host"] += 1
    elif ours and func in _INDEXING:
        crossings["to device"] += sum(bool(part.ndim) for part in hosts)
    elif ours and any(part.ndim for part in hosts):
        shapes = [(str(part.device), tuple(part.shape)) for part in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    if ours and func in _WAITING:
        crossings["waits"] += 1
    out = func(*_content(args), **_content(kwargs))
    own = {id(part.inner): part for part in ours}  # an operation in place returns what it got

    def wrapped(part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        if id(part) in own:
            return own[id(part)]
        return DeviceTensor(part) if to_us else part

    return tree_map(wrapped, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _given(args: Any, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for part in (*args, *kwargs.values()):
        if isinstance(part, torch.Tensor):
            yield part


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have ``cuda:0`` in this thread and in those that are started meanwhile."""
    launch: Callable[..., None] = GridExecutor.__call__
    run = threading.Thread.run

    def launch_inside(self: Any, *args: Any, **kwargs: Any) -> None:
        kinds = {isinstance(part, DeviceTensor) for part in _given(args, kwargs)}
        if kinds == {True, False}:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        with _one_at_a_time, torch.utils._python_dispatch._disable_current_modes():
            launch(self, *_content(args), **_content(kwargs))

    def run_inside(self: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # of a thread
        with _Mode():
            run(self)

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "_lazy_init", lambda: None)
        patched.setattr(GridExecutor, "__call__", launch_inside)
        patched.setattr(threading.Thread, "run", run_inside)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=) goes past modes
        try:
            with _Mode():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
