"""Passes of few rows on a GPU as CUDA graphs: what lies between two attentions is one launch.

The GPU is done with such a pass sooner than Python has launched its kernels one by one. A graph
replays launches as they were captured: the same kernels, grids and addresses. So a pass is padded
to the next of ``SIZES``, its tokens are copied to where the capture found them, and each graph
leaves what the next one reads.

Attention stays outside, as in vLLM's piecewise graphs: how many programs it takes, and where they
read, follows from what sequences hold at the moment. So nothing that was captured knows the pool,
its tables or its memory, rows of padding are attended by nobody and written nowhere, and a pass may
be a step of many sequences, a prompt's chunk or both. What is captured are the weights, the tables
of angles and the memory of the passes themselves, all of which stay where they are.

The first pass of a size runs kernel by kernel, on the stream that will capture: kernels are
compiled and libraries allocate what they need. The second one captures, piece by piece, and
replays. Where that fails, for want of memory or whatever reason, the size runs kernel by kernel
from then on.
"""

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from kvstrata.engine.staging import TIMEOUT_S, wait_for

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows of a pass; so there are no more graphs than these of layers

Piece = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(eq=False)
class _Size:
    """The graphs of all passes that are padded to one number of rows."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    attended: torch.Tensor | None = None
    is_warm: bool = False
    is_eager: bool = False
    graphs: list[Any] = field(default_factory=list)
    outputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)


class StepGraphs:
    """The graphs of one model on one GPU. Not thread-safe: one thread runs the model.

    Attributes:
        counts: ``graph_passes`` that replayed, ``graph_captures`` of pieces; and why passes went
            without: ``graph_too_long``, ``graph_warm_ups``, ``graph_failures`` of sizes,
            ``graph_failed_passes`` of these.
    """

    def __init__(
        self, device: torch.device, sizes: Sequence[int] = SIZES, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Make none yet.

        Args:
            device: The model's.
            sizes: Rows that passes are padded to, ascending.
            timeout_s: How long a capture waits for what the GPU still has to do.
        """
        self._device = device
        self._sizes = {size: _Size(self._ids(size), self._ids(size)) for size in sizes}
        self._timeout_s = timeout_s
        self._stream: Any = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()  # of all graphs: one runs at a time
        self.counts: Counter[str] = Counter()

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """Return the graphs of a device; None where there are none."""
        return cls(device) if device.type == "cuda" else None

    def begin(self, token_ids: Sequence[int], positions: Sequence[int]) -> "GraphedPass | None":
        """Begin a pass over some rows; None if it has to run without graphs."""
        size = next((size for size in self._sizes if size >= len(token_ids)), None)
        if size is None:
            self.counts["graph_too_long"] += 1
            return None
        own = self._sizes[size]
        if own.is_eager:
            self.counts["graph_failed_passes"] += 1
            return None
        for held, given in ((own.token_ids, token_ids), (own.positions, positions)):
            held[: len(given)].copy_(torch.tensor(given, dtype=torch.int64), non_blocking=True)
        return GraphedPass(self, own, len(token_ids))

    def _ids(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=torch.int64, device=self._device)

    def _warm_up(self, piece: Piece) -> tuple[torch.Tensor, ...]:
        """Run a piece as it is, on the stream that will capture it."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            made = piece()
        computing.wait_stream(self._stream)
        return made

    def _capture(self, size: _Size, piece: Piece) -> bool:
        """Add the graph of a piece, which is not run; False if the size has to do without."""
        if not size.graphs:
            gc.collect()  # nothing of before may be freed by chance while kernels are captured
        try:
            before = torch.cuda.Event()
            before.record(torch.cuda.current_stream(self._device))
            wait_for(before, self._timeout_s)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls count: others copy blocks meanwhile.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    outputs = piece()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Exception as error:
            size.is_eager = True
            self.counts["graph_failures"] += 1
            logger.warning(
                "passes run without CUDA graphs",
                extra={"rows": len(size.token_ids), "error": repr(error)},
            )
            return False
        size.graphs.append(graph)
        size.outputs.append(outputs)
        self.counts["graph_captures"] += 1
        return True


class GraphedPass:
    """One pass: ``run`` piece after piece, ``attended`` between two of them.

    Attributes:
        num_rows: Of the pass; tensors have more, which mean nothing.
        token_ids: int64 (size,).
        positions: int64 (size,).
    """

    def __init__(self, graphs: StepGraphs, size: _Size, num_rows: int) -> None:
        """Begin; see ``StepGraphs.begin``."""
        self.num_rows = num_rows
        self.token_ids, self.positions = size.token_ids, size.positions
        self._graphs = graphs
        self._size = size
        self._is_warm = size.is_warm
        self._num_run = 0

    def run(self, piece: Piece) -> tuple[torch.Tensor, ...]:
        """Return what the next piece of the pass returns, up to rounding.

        Args:
            piece: The same in all passes, but for the numbers in ``token_ids``, ``positions``, in
                what ``attended`` and the last ``run`` returned, and in tensors that stay for ever.
                It must not wait for the GPU, nor change anything.

        Returns:
            Of now: the next pass overwrites it.
        """
        index, size = self._num_run, self._size
        self._num_run += 1
        if not self._is_warm:
            return self._graphs._warm_up(piece)
        if size.is_eager or (index == len(size.graphs) and not self._graphs._capture(size, piece)):
            return piece()
        size.graphs[index].replay()
        return size.outputs[index]

    def attended(self, out: torch.Tensor) -> torch.Tensor:
        """Put what attention returned, (num_rows, width), where the next piece reads it.

        Returns:
            (size, width).
        """
        size = self._size
        if size.attended is None:
            with torch.inference_mode(False):
                size.attended = out.new_zeros(len(self.token_ids), out.shape[1])
        size.attended[: self.num_rows].copy_(out)
        return size.attended

    def end(self) -> None:
        """Count the pass; to be called when its last piece has run."""
        self._size.is_warm = True
        if not self._is_warm:
            name = "graph_warm_ups"
        else:
            name = "graph_failed_passes" if self._size.is_eager else "graph_passes"
        self._graphs.counts[name] += 1
