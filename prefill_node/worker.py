"""What prefill and decode nodes have in common: a model, one compute thread, a way to the store."""

import asyncio
import contextlib
import logging
import os
import platform
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kvstrata.engine.gpu_monitor import GPUMonitor
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.staging import Staging
from kvstrata.engine.step_graphs import StepGraphs
from kvstrata.engine.step_loop import StepLoop
from kvstrata.kernels.warmup import WORKER_OPS, warm_up
from kvstrata.kvstore_service.client import FetchedStratum, PutOutcome, StoreClient
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.prefill_node.read_rates import Arrivals, ReadRates, settings_of
from kvstrata.prefill_node.task import Task
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import CorruptFrameError, DeadlineError, KVStrataError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.heap import keep_freed_memory
from kvstrata.protos.identity import BlockHash, ScopeDigest
from kvstrata.protos.inference_pb2 import NodeUse
from kvstrata.protos.logs import FORMAT_VARIABLE, configure_logging
from kvstrata.protos.report import ReportClock, farthest_tier
from kvstrata.protos.retention import Retention
from kvstrata.protos.tracing import configure_tracing

_POOL_SHARE = 8
_GPU_MARGIN_BYTES = 2 << 30  # for what passes compute, and for sequences beside the pool
STORE_FAILURES = (
    "store_timeout",
    "store_unavailable",
)  # reasons for which blocks are not asked again
SLOWEST_LINK_BYTES_PER_S = 10e6  # a put gets that much longer than an idle exchange

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How a node starts.

    Attributes:
        store_address: Of the store's gRPC server.
        model: Folder, hub id, or None for the default model.
        dtype: "auto", "float32", "bfloat16" or "float16".
        adapter: Folder of a LoRA that is merged into the weights; None for none.
        num_threads: CPU threads for the model; 0 is all cores.
        device: "auto", "cpu" or "cuda".
        store_timeout_s: Longest silence of the store before computing instead.
        pool_bytes: KV memory of running sequences; 0 is an eighth of the machine's, or of what is
            free on a GPU all but a quarter.
        warm_up: Before the first request, compile the CPU kernels or load them from disk, and map
            memory for the longest sequence.
        credentials: Shown to the store; the files must be there on the node.
    """

    store_address: str
    model: str | None = None
    dtype: str = "auto"
    num_threads: int = 0
    device: str = "auto"
    store_timeout_s: float = 5.0
    pool_bytes: int = 0
    warm_up: bool = False
    credentials: ClientCredentials = ANONYMOUS
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What the gateway must know of the model to name blocks and check requests."""

    model: str
    fingerprint: bytes
    kv_dtype: str
    max_positions: int
    vocab_size: int
    kv_bytes_per_token_bf16: int
    pid: int
    profile_id: str = ""
    gates_id: str = ""
    num_layers: int = 0
    placeholder_id: int = 0
    image_tokens: int = 0  # that an image takes; 0 for a model of text alone


class Worker:
    """A loaded model, the loop that runs its sequences, and a store client.

    Attributes:
        model: What is served.
        steps: Runs sequences; all that touches one runs there.
        rates: What reading and computing blocks took so far.
    """

    def __init__(self, config: WorkerConfig) -> None:
        keep_freed_memory()
        if os.environ.get(FORMAT_VARIABLE):
            configure_logging()
        configure_tracing("kvstrata-node")
        torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        self.config = config
        self.model = Model.load(
            config.model, adapter=config.adapter, dtype=config.dtype, device=config.device
        )
        self.graphs = StepGraphs.of(self.model.device)
        self.model.pack(self.graphs)
        spec = self.model.spec
        if config.warm_up and self.model.device.type == "cpu" and spec.head_dim % 16 == 0:
            warm_up((spec.head_dim,), (spec.dtype,), WORKER_OPS)
        gpu = GPUMonitor.of(self.model.device)
        pool_bytes = config.pool_bytes or _default_pool_bytes(self.model.device, gpu)
        pool = KVPool(self.model, pool_bytes, gpu=gpu, staging=Staging.of(self.model.device))
        if config.warm_up:
            pool.arena.touch(RowBuffer.bytes_for(spec, spec.max_positions))
        self.steps = StepLoop(self.model, pool)
        self.rates = ReadRates()
        self._store: StoreClient | None = None

    @property
    def store(self) -> StoreClient:
        """The store client; made on first use, because it belongs to the running event loop."""
        if self._store is None:
            self._store = StoreClient(
                self.config.store_address,
                timeout_s=self.config.store_timeout_s,
                credentials=self.config.credentials,
            )
        return self._store

    def info(self) -> WorkerInfo:
        """Return what this worker serves."""
        spec, vision = self.model.spec, self.model.vision
        return WorkerInfo(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            kv_dtype=spec.dtype_name,
            max_positions=spec.max_positions,
            vocab_size=spec.vocab_size,
            kv_bytes_per_token_bf16=spec.kv_bytes_per_token_bf16,
            pid=os.getpid(),
            profile_id=self.model.profile.profile_id if self.model.profile else "",
            gates_id=self.model.gates.gates_id if self.model.gates else "",
            num_layers=spec.num_layers,
            placeholder_id=vision.placeholder_id if vision else 0,
            image_tokens=vision.num_tokens if vision else 0,
        )

    def use(self, node: str) -> NodeUse:
        """Return what this node uses of its memory now, for a report."""
        steps, pool = self.steps, self.steps.pool
        found = NodeUse(
            node=node,
            worker=f"{platform.node()}:{os.getpid()}",
            pool_bytes=pool.arena.capacity_bytes,
            pool_used_bytes=pool.arena.used_bytes,
            parked=steps.counts.get("parked"),
            expired=steps.counts.get("expired"),
        )
        if pool.gpu is not None and (gpu := pool.gpu.read()) is not None:
            found.gpu_bytes, found.gpu_used_bytes = gpu.num_bytes, gpu.used_bytes
            found.gpu_busy = gpu.busy
        if pool.staging is not None:
            late = pool.staging.counts
            found.late_copies = late["late_blocks"] + late["late_reads"]
        if self.graphs is not None:
            found.graph_passes = self.graphs.counts["graph_passes"]
            found.graph_failed_passes = self.graphs.counts["graph_failed_passes"]
        return found

    @contextlib.asynccontextmanager
    async def open(
        self, task: Task, token_ids: Sequence[int], num_cached: int, order: int
    ) -> AsyncIterator[RunningSequence]:
        """See the images, wait for room and hold a sequence of a task; see ``StepLoop.open``.

        Raises:
            DeadlineError: The task's deadline passed.
            ImageError: The model's processor refuses an image.
        """
        _ = task.remaining_s
        images = self.model.images
        images.acquire(task.images)
        try:
            await asyncio.to_thread(images.see, task.images)
            sequence = await self.steps.open(
                task.method,
                token_ids,
                num_cached=num_cached,
                tenant=task.tenant,
                deadline_unix_s=task.deadline_unix_s,
                salt=task.salt,
                num_prompt=len(task.prompt_ids),
                order=order,
            )
            try:
                yield sequence
            finally:
                await self.steps.close(sequence)
        finally:
            images.release(task.images)

    async def fetch(
        self,
        scope: ScopeDigest,
        hashes: Sequence[BlockHash],
        method: Method,
        clock: ReportClock,
        *,
        strata: Sequence[Stratum] = (),
        stage: str = "fetch",
    ) -> tuple[list[dict[Stratum, Frame]], str | None]:
        """Return the strata of the longest run of blocks that the store serves.

        Without ``strata`` those that ``method`` reads. Never raises for a store that is gone, slow
        or wrong: the run is then shorter, and the second value says why.
        """
        strata = strata or method.wanted
        blocks: list[dict[Stratum, Frame]] = [{} for _ in hashes]
        reasons: dict[int, str] = {}
        failure = None
        with clock.stage(stage):
            arrivals = Arrivals()
            try:
                async for piece in self._pieces(scope, hashes, strata):
                    if piece.frame is None:
                        reasons.setdefault(piece.index, piece.miss)
                        continue
                    blocks[piece.index][cast(Stratum, piece.stratum)] = piece.frame
                    arrivals.add(piece.tier, piece.stratum, piece.num_bytes)
                    with contextlib.suppress(CorruptFrameError):  # found again by who decodes it
                        piece.frame.segments()  # here, while the others are on their way
                self.rates.fetched(arrivals, settings_of(method.codec), method.codec.strata)
            except KVStrataError as error:
                failure = store_failure(error)
                logger.warning("fetch failed", extra={"reason": failure, "error": str(error)})
        run = 0
        while run < len(blocks) and len(blocks[run]) == len(strata):
            run += 1
        clock.report.bytes_fetched += arrivals.num_bytes
        clock.report.tier = farthest_tier({clock.report.tier, *arrivals.tiers})
        return blocks[:run], (reasons.get(run) or failure) if run < len(hashes) else None

    async def _pieces(
        self, scope: ScopeDigest, hashes: Sequence[BlockHash], strata: Sequence[Stratum]
    ) -> AsyncGenerator[FetchedStratum]:
        """Yield what the store sends; a pause of ``store_timeout_s`` between two pieces ends it."""
        limit = self.config.store_timeout_s
        whole = limit * (1 + len(hashes))
        async with contextlib.aclosing(
            self.store.get(scope, hashes, strata, timeout_s=whole)
        ) as pieces:
            while True:
                try:
                    yield await asyncio.wait_for(anext(pieces), limit)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise DeadlineError(f"the store was silent for {limit} s") from error

    async def publish(
        self,
        blocks: Sequence[SealedBlock],
        clock: ReportClock,
        retention: Retention | None = None,
    ) -> None:
        """Put sealed blocks into the store. A failure is counted, not raised: recompute is safe."""
        if not blocks:
            return
        with clock.stage("ship"):
            try:
                results = await self.store.put(
                    ((b.identity.key, dict(b.frames.items())) for b in blocks),
                    retention=retention,
                    timeout_s=self.ship_s(blocks),
                )
            except KVStrataError as error:
                reason = store_failure(error)
                logger.warning("publish failed", extra={"reason": reason, "error": str(error)})
                clock.recompute(f"unpublished_{reason}", 0)
                return
        self.count_published(zip(blocks, results, strict=True), clock)

    def ship_s(self, blocks: Iterable[SealedBlock]) -> float:
        """Return how long publishing may take."""
        num_bytes = sum(block.num_bytes for block in blocks)
        return self.config.store_timeout_s + num_bytes / SLOWEST_LINK_BYTES_PER_S

    def count_published(
        self, results: Iterable[tuple[SealedBlock, PutOutcome]], clock: ReportClock
    ) -> None:
        """Record what became of published blocks."""
        for block, result in results:
            if result.outcome != "rejected":
                clock.report.bytes_published += block.num_bytes
                clock.report.committed_blocks += 1
            else:
                # The text before the colon is one of a few words; what follows names the block.
                clock.recompute(f"unpublished_{result.reason.partition(':')[0]}", 0)

    async def close(self) -> None:
        """Release the thread and the connection."""
        if self._store is not None:
            await self._store.close()
        await asyncio.to_thread(self.steps.stop)


def _default_pool_bytes(device: torch.device, gpu: GPUMonitor | None) -> int:
    if device.type == "cuda":
        told = None if gpu is None else gpu.free_bytes()
        free: int = torch.cuda.mem_get_info(device)[0] if told is None else told
        return max(free - max(free // 4, _GPU_MARGIN_BYTES), free // 4)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _POOL_SHARE


def store_failure(error: KVStrataError) -> str:
    """Return the counter label of a failed exchange with the store."""
    return STORE_FAILURES[not isinstance(error, DeadlineError)]
