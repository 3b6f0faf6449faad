"""A stand-in for ``torch.cuda``: streams that run late, events, graphs; over CPU tensors.

What is launched on a stream waits in its queue. It runs when somebody waits for it (the host for an
event or a stream, or another stream's queue that has to get past it), and no earlier: so a wait
that is missing shows as wrong bytes. With ``hasty`` streams run as soon as their own waits allow,
which shows the waits that are missing on the other side. A stream that is ``stuck`` never runs.

Work on a side stream, or while a graph is captured, is what torch dispatches there; Triton's
kernels, here interpreted, are known by their launches. On the current stream of the test itself
torch runs at once, and ``launch`` queues.
"""

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")


class FakeEvent:
    """Fires when its stream has got to where it was recorded last."""

    def __init__(self) -> None:
        self.recorded: object | None = None
        self.passed: set[object] = set()
        self.stream: FakeStream | None = None

    def record(self, stream: "FakeStream") -> None:
        mark = self.recorded = object()
        self.stream = stream
        stream.launch(lambda: self.passed.add(mark))

    def query(self) -> bool:
        """Time passes: the stream gets on, but this call does not see it yet."""
        if self.recorded is None or self.recorded in self.passed:
            return True
        assert self.stream is not None
        self.stream.run_until(self, self.recorded)
        return False

    def synchronize(self) -> None:
        raise AssertionError("a wait without bound")


class FakeStream:
    """A queue of what was launched; a wait is an event with what it waits for."""

    def __init__(self, device: Any = None) -> None:
        self.queue: deque[Callable[[], Any] | tuple[FakeEvent, object]] = deque()
        self.is_hasty = False
        self.is_stuck = False

    def launch(self, work: Callable[[], Any]) -> None:
        self.queue.append(work)
        self.get_on()

    def get_on(self) -> None:
        """Run as far as no wait is open, if this stream is hasty."""
        while self.is_hasty and self.queue and not self.is_stuck:
            head = self.queue[0]
            if isinstance(head, tuple) and head[1] not in head[0].passed:
                return
            self._run_next()

    def wait_event(self, event: FakeEvent) -> None:
        if event.recorded is not None:
            self.queue.append((event, event.recorded))

    def wait_stream(self, other: "FakeStream") -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def run_until(self, event: FakeEvent, mark: object) -> None:
        while mark not in event.passed and self.queue and not self.is_stuck:
            self._run_next()

    def synchronize(self) -> None:
        while self.queue:
            assert not self.is_stuck, "the test waits for a stream that is stuck"
            self._run_next()

    def _run_next(self) -> None:
        head = self.queue.popleft()
        if not isinstance(head, tuple):
            head()
            return
        event, mark = head
        if mark not in event.passed:
            assert event.stream is not None
            event.stream.run_until(event, mark)
            if mark not in event.passed:  # it is stuck, and so is this one
                self.queue.appendleft(head)
                self.is_stuck = True


class _Queue(TorchDispatchMode):
    """Queues copies on a stream; views are made at once."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            assert not func._schema.is_mutable, f"{func} on a stream that copies"
            return func(*args, **(kwargs or {}))
        self._stream.launch(lambda: func(*args))
        return args[0]


class FakeCuda:
    """Stands in for what ``torch.cuda`` offers to streams. Make it with ``fake_cuda``.

    Attributes:
        computing: The current stream of whoever asks.
        streams: All others, in the order of their making.
        pinned_bytes: How much was pinned.
        can_pin: Whether there is memory that can be pinned.
        is_hasty: Whether streams made from now on run as soon as they can.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computing = FakeStream()
        self.streams: list[FakeStream] = []
        self.pinned_bytes = 0
        self.can_pin = True
        self.is_hasty = False
        self._empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Stream", self._make)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: self.computing)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch, "empty", self._pin)

    def launch(self, work: Callable[[], Any]) -> None:
        """Queue a kernel on the current stream."""
        self.computing.launch(work)

    def _make(self, device: torch.device) -> FakeStream:
        assert device == CUDA
        self.streams.append(FakeStream())
        self.streams[-1].is_hasty = self.is_hasty
        return self.streams[-1]

    @contextlib.contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        with _Queue(stream):
            yield

    def _pin(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = self._empty(*args, **kwargs)
        if pin_memory:
            if not self.can_pin:
                raise RuntimeError("out of memory that can be locked")
            self.pinned_bytes += made.nbytes
        return made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU of which the host sees nothing that it does not wait for."""
    return FakeCuda(monkeypatch)


_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


class FakeGraph:
    """What was dispatched while it was captured; replayed over the same tensors."""

    def __init__(self, gpu: "FakeGraphs") -> None:
        self._gpu = gpu
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert pool is self._gpu.memory
        assert self._gpu.current is not self._gpu.computing, "on a side stream alone"
        assert self._gpu.capturing is None
        self._gpu.capturing = self

    def capture_end(self) -> None:
        assert self._gpu.capturing is self
        self._gpu.capturing = None

    def add(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note a call. Nothing is computed: what it returns means nothing until it is replayed."""
        if func in _WAITING or func in self._gpu.refused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if func._schema.is_mutable:
            made: Any = args[0]
            self._calls.append((func, args, kwargs, []))
            return made
        made = func(*args, **kwargs)
        outputs = _fresh(made, args)
        for part in outputs:
            part.fill_(float("nan")) if part.is_floating_point() else part.zero_()
        self._calls.append((func, args, kwargs, outputs))
        return made

    def replay(self) -> None:
        self._gpu.num_replays += 1
        for func, args, kwargs, outputs in self._calls:
            self._gpu.note(func, args, kwargs, outputs)
            made = func(*args, **kwargs)
            for part, new in zip(outputs, _fresh(made, args), strict=True):
                part.copy_(new)


class FakeGraphs(TorchDispatchMode):
    """Stands in for the graphs of ``torch.cuda``; work runs at once, and its order is checked.

    Whoever reads or writes what another stream has touched must have waited for that stream since
    (clocks of vectors, as race detectors have them). While a graph is captured, what waits for the
    GPU is refused.

    Attributes:
        current: The stream of now.
        refused: Operations that cannot be captured.
        num_captures: Graphs made.
        num_replays: How often one ran.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.computing = self.current = object()
        self.memory = object()
        self.capturing: FakeGraph | None = None
        self.refused: set[Any] = set()
        self.num_captures = self.num_replays = 0
        self.is_stuck = False
        self._clocks: dict[object, Counter[object]] = defaultdict(Counter)
        self._touched: dict[int, dict[object, tuple[int, bool]]] = defaultdict(dict)
        self._held: list[torch.Tensor] = []  # no memory is used twice, which nobody could tell
        gpu = self

        class Stream:
            def __init__(self, _device: torch.device) -> None:
                pass

            def wait_stream(self, other: object) -> None:
                gpu.wait(self, other)

        class Computing(Stream):
            pass

        class Event:
            def record(self, _stream: object) -> None:
                pass

            def query(self) -> bool:
                return not gpu.is_stuck

        self.computing = self.current = Computing(CUDA)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self._make)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: self.memory)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    def _make(self) -> FakeGraph:
        self.num_captures += 1
        return FakeGraph(self)

    @contextlib.contextmanager
    def _on(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait(self, stream: object, other: object) -> None:
        own = self._clocks[stream]
        for name, time in self._clocks[other].items():
            own[name] = max(own[name], time)

    def note(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Check that a call on the current stream is ordered behind what it depends on."""
        own = self._clocks[self.current]
        own[self.current] += 1
        written = {id(args[0])} if func._schema.is_mutable else set()
        written |= {id(part) for part in outputs}
        for part in _tensors((args, kwargs, outputs)):
            self._held.append(part)
            touched = self._touched[part.untyped_storage().data_ptr()]
            writes = id(part) in written
            for stream, (time, was_written) in touched.items():
                if stream is not self.current and (writes or was_written):
                    assert own[stream] >= time, f"{func} does not wait for another stream"
            touched[self.current] = own[self.current], writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.capturing is not None:
            return self.capturing.add(func, args, kwargs)
        made = func(*args, **kwargs)
        self.note(func, args, kwargs, _fresh(made, args))
        return made


def _fresh(made: Any, args: Any) -> list[torch.Tensor]:
    """Return what a call made in memory of its own: no views, nor what it got."""
    given = {part.untyped_storage().data_ptr() for part in _tensors(args)}
    return [part for part in _tensors(made) if part.untyped_storage().data_ptr() not in given]


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors with memory; oneDNN's weights, which nobody writes, have none to see."""
    parts = [part for part in tree_leaves(tree) if isinstance(part, torch.Tensor)]
    return [part for part in parts if part.layout is torch.strided]


@pytest.fixture
def graphs_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGraphs]:
    """A GPU on which all that torch dispatches in the test runs."""
    gpu = FakeGraphs(monkeypatch)
    with gpu:
        yield gpu
