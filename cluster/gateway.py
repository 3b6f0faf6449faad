"""The gateway: checks a request, routes it, streams its tokens, whatever happens to the workers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from kvstrata.cluster.admission import Admission
from kvstrata.cluster.node_uses import NodeUses
from kvstrata.cluster.request_meter import RequestMeter, count_report
from kvstrata.cluster.router import Route, Router
from kvstrata.cluster.workers import WorkerLostError, Workers
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.methods.presets import PRESETS
from kvstrata.prefill_node.flight import ANNOUNCED
from kvstrata.prefill_node.prefill import PLANNED_AGAIN
from kvstrata.prefill_node.task import Task
from kvstrata.protos import call_context, inference_pb2_grpc, tracing
from kvstrata.protos.errors import CapacityError, DeadlineError, DrainingError, UnavailableError
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import (
    CacheReport,
    GenerateReply,
    GenerateRequest,
    GetModelReply,
    GetModelRequest,
)
from kvstrata.protos.report import ReportClock, merge_reports
from kvstrata.protos.retention import MAX_NAME_CHARS
from kvstrata.protos.retention_pb2 import ReleaseReply, ReleaseRequest
from kvstrata.protos.service import metadata_of

MAX_REPLAYS = 8
UNREACHABLE = ("store_unavailable", "store_timeout")
MAX_RUNNING_BYTES = 4 << 30  # KV of all running requests, counted as bf16 at their longest

logger = logging.getLogger(__name__)


class Gateway(inference_pb2_grpc.InferenceServicer):
    """Serves ``Inference``. One per process; any number may share the workers and the store.

    The caller's tenant decides the salt of its cache scopes: the blocks of two tenants have nothing
    in common, not even a name.
    """

    def __init__(
        self,
        admission: Admission,
        router: Router,
        workers: Workers,
        counters: Counters,
        tenants: Tenants | None = None,
    ) -> None:
        self._admission = admission
        self._router = router
        self._workers = workers
        self._counters = counters
        self._tenants = tenants or Tenants()
        self.quotas = Quotas(counters)
        self.node_uses = NodeUses()
        self._running = 0
        self._running_bytes = 0
        self.draining = False

    @property
    def num_running(self) -> int:
        """Requests that are being served now."""
        return self._running

    @property
    def running_bytes(self) -> int:
        """KV that they may take, counted as bf16 at their longest."""
        return self._running_bytes

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: Any
    ) -> AsyncGenerator[GenerateReply]:
        """See ``inference.proto``."""
        if self.draining:
            raise DrainingError("the gateway is shutting down", "send the request to another one")
        self._running += 1
        outcome = "cancelled"
        clock = ReportClock("gateway")
        meter = RequestMeter(self._counters)
        held = 0
        try:
            tenant = self._tenants.identify(metadata_of(context))
            self.quotas.count_request(tenant)
            with clock.stage("route"):
                task = await asyncio.to_thread(
                    self._admission.admit, request, context.time_remaining()
                )
                task = replace(
                    task,
                    tenant=tenant.name,
                    salt=tenant.scope_salt(task.salt),
                    retention=task.retention and replace(task.retention, account=tenant.name),
                    request_id=call_context.request_id.get() or task.request_id,
                )
                call_context.request_id.set(task.request_id)
                logger.info("request admitted", extra={"session_id": task.session_id})
                held = self._reserve(task)
                route = await self._router.route(task)
                meter.found(route.cached_blocks, route.num_blocks)
            async with contextlib.aclosing(self._serve(task, route, clock)) as replies:
                async for reply in replies:
                    meter.delivered(len(reply.token_ids))
                    yield reply
            outcome = "ok"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._running -= 1
            self._running_bytes -= held
            count_report(self._counters, clock.report)
            meter.end(outcome)

    def _reserve(self, task: Task) -> int:
        """Return the bytes that the request's KV may take, now counted as running.

        Raises:
            CapacityError: Too much is running already.
        """
        info = self._admission.info
        longest = min(len(task.prompt_ids) + task.sampling.max_tokens, info.max_positions)
        needed = longest * info.kv_bytes_per_token_bf16
        if self._running_bytes and self._running_bytes + needed > MAX_RUNNING_BYTES:
            raise CapacityError(
                f"{self._running} requests are running, this one does not fit beside them",
                "try again in a moment, or ask for fewer tokens",
            )
        self._running_bytes += needed
        return needed

    async def GetModel(self, request: GetModelRequest, context: Any) -> GetModelReply:  # noqa: N802
        """See ``inference.proto``."""
        info = self._admission.info
        return GetModelReply(
            name=info.model,
            fingerprint=info.fingerprint,
            max_positions=info.max_positions,
            vocab_size=info.vocab_size,
            presets=PRESETS,
            block_tokens=BLOCK_TOKENS,
            kv_bytes_per_token_bf16=info.kv_bytes_per_token_bf16,
            profile_id=info.profile_id,
            placeholder=self._admission.placeholder,
            picture_tokens=info.image_tokens,
        )

    async def Release(self, request: ReleaseRequest, context: Any) -> ReleaseReply:  # noqa: N802
        """See ``inference.proto``."""
        tenant = self._tenants.identify(metadata_of(context))
        self.quotas.count_request(tenant)
        blocks = await self._router.release(request.session[:MAX_NAME_CHARS], tenant.name)
        return ReleaseReply(blocks=blocks)

    async def _serve(
        self, task: Task, route: Route, clock: ReportClock
    ) -> AsyncGenerator[GenerateReply]:
        if route.failure:
            clock.recompute(route.failure, 0)
        task = replace(
            task,
            expected_blocks=route.cached_blocks,
            stored=route.stored,
            ask_store=route.failure not in UNREACHABLE,
        )
        if route.needs_prefill:
            handed = _Handed(expected_blocks=route.cached_blocks)
            async with contextlib.aclosing(self._prefill(task, route, clock, handed)) as replies:
                async for reply in replies:
                    yield reply
            task = replace(
                task,
                generated_ids=tuple(handed.token_ids),
                expected_blocks=handed.expected_blocks,
            )
        async for reply in self._decode(task, clock):
            if reply.finish_reason:
                reply.cache.CopyFrom(self._closing_report(reply.cache, task, route, clock))
            yield reply

    async def _prefill(
        self, task: Task, route: Route, clock: ReportClock, handed: "_Handed"
    ) -> AsyncGenerator[GenerateReply]:
        """Have a prefill node publish the prompt's blocks, and stream the token that it chooses.

        Where it dies, before the token or after it, the decode node computes the blocks.
        """
        report = CacheReport()
        span = tracing.start("gateway.prefill", "client")
        try:
            with span:
                work = self._workers.prefill(replace(task, traceparent=span.traceparent))
                async with contextlib.aclosing(work) as replies:
                    async for reply in replies:
                        if reply.token_ids:
                            handed.token_ids += reply.token_ids
                            yield reply
                        report.MergeFrom(reply.cache)
        except DeadlineError:
            raise
        except Exception as error:
            lost = isinstance(error, WorkerLostError | UnavailableError)
            reason = "prefill_worker_lost" if lost else "prefill_failed"
            extra = {"reason": reason, "error": str(error)}
            logger.warning("prefill failed", extra=extra, exc_info=not lost)
            clock.recompute(reason, (route.num_blocks - route.cached_blocks) * BLOCK_TOKENS)
            return
        merge_reports(clock.report, report)
        if report.committed_blocks >= route.num_blocks - route.cached_blocks:
            handed.expected_blocks = route.num_blocks

    async def _decode(self, task: Task, clock: ReportClock) -> AsyncGenerator[GenerateReply]:
        """Stream a decode node's replies; when it dies, go on elsewhere from the last token."""
        delivered = list(task.generated_ids)
        for attempt in range(MAX_REPLAYS + 1):
            start = time.time()
            span = tracing.start("gateway.decode", "client", attempt=attempt)
            rest = replace(task, generated_ids=tuple(delivered), traceparent=span.traceparent)
            try:
                with span:
                    async with contextlib.aclosing(self._workers.decode(rest)) as replies:
                        async for reply in replies:
                            delivered += reply.token_ids
                            yield reply
                            if reply.finish_reason:
                                return
                raise WorkerLostError("the stream ended without a closing reply")
            except WorkerLostError as error:
                logger.warning("decode worker lost", extra={"error": str(error)})
                clock.recompute("decode_worker_lost", len(delivered))
                clock.report.replays = attempt + 1
                clock.add("replay", start, time.time() - start)
                if task.deadline_unix_s - time.time() <= 0:
                    raise DeadlineError(
                        "the request's deadline passed while its worker restarted",
                        "raise the timeout",
                    ) from error
        raise UnavailableError(
            f"{MAX_REPLAYS + 1} decode workers died under this request", "look at their logs"
        )

    def _closing_report(
        self, decoded: CacheReport, task: Task, route: Route, clock: ReportClock
    ) -> CacheReport:
        report = CacheReport()
        report.CopyFrom(clock.report)
        merge_reports(report, decoded)
        # Blocks come as one run from the first on: those lost are the last of the expected ones.
        # Blocks that others were making are not among the expected ones.
        lost = max((r.tokens for r in decoded.recomputes if _was_expected(r.reason)), default=0)
        loaded = task.expected_blocks * BLOCK_TOKENS - lost
        report.cached_tokens = max(0, min(route.cached_blocks * BLOCK_TOKENS, loaded))
        if not report.cached_tokens:
            report.tier = ""
        count_report(self._counters, report)
        self.node_uses.note(report.nodes)
        del report.nodes[:]  # the operator's to know, not the client's
        clock.report.Clear()  # counted with the rest; a request that ends earlier is counted then
        return report


@dataclass
class _Handed:
    """What the prefill node leaves to the decode node.

    Attributes:
        expected_blocks: That are in the store now.
        token_ids: Delivered already.
    """

    expected_blocks: int
    token_ids: list[int] = field(default_factory=list)


def _was_expected(reason: str) -> bool:
    """Whether a recompute is of blocks that the route promised."""
    return reason not in ("unencodable", PLANNED_AGAIN) and not reason.startswith(ANNOUNCED)
