"""Nodes in this process behind the gateway's own interface, able to die on demand."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from kvstrata.cluster.gateway_server import GatewayServer, start_gateway
from kvstrata.cluster.workers import WorkerLostError
from kvstrata.engine import Model
from kvstrata.prefill_node import Task, WorkerConfig
from kvstrata.protos import admin_pb2, inference_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import KVStrataError, from_rpc_error
from kvstrata.protos.inference_pb2 import GenerateReply, GenerateRequest
from kvstrata.protos.inference_pb2_grpc import InferenceStub
from tests.prefill_node.nodes import Answer, Nodes, answer_of, running

GENERATE = "/kvstrata.v1.Inference/Generate"


class LocalWorkers:
    """Calls the nodes directly.

    Attributes:
        prefill_error: Raised by ``prefill`` in place of work.
        prefill_dies: Whether the node dies after its first reply, which is the first token.
        dies_at: For the calls of ``decode`` to come, before which reply the node dies; None never.
        pause_s: Before every reply of ``decode``.
        prefills: Tasks that ``prefill`` was given.
        decodes: Tasks that ``decode`` was given.
        num_open: Streams of ``decode`` that have neither ended nor been closed.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.prefill_error: Exception | None = None
        self.prefill_dies = False
        self.dies_at: list[int | None] = []
        self.pause_s = 0.0
        self.prefills: list[Task] = []
        self.decodes: list[Task] = []
        self.num_open = 0

    async def prefill(self, task: Task) -> AsyncGenerator[GenerateReply]:
        self.prefills.append(task)
        if self.prefill_error is not None:
            raise self.prefill_error
        replies: Any = self._nodes.prefill.prefill(task)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                yield GenerateReply.FromString(reply)
                if self.prefill_dies:
                    raise WorkerLostError("the node died")

    async def decode(self, task: Task) -> AsyncGenerator[GenerateReply]:
        self.decodes.append(task)
        dies_at = self.dies_at.pop(0) if self.dies_at else None
        replies: Any = self._nodes.decode.generate(task)
        self.num_open += 1
        try:
            async with contextlib.aclosing(replies):
                count = 0
                if dies_at == 0:
                    raise WorkerLostError("the node died")
                async for reply in replies:
                    await asyncio.sleep(self.pause_s)
                    yield GenerateReply.FromString(reply)
                    count += 1
                    if count == dies_at:
                        raise WorkerLostError("the node died")
        finally:
            self.num_open -= 1


@dataclass(frozen=True)
class Cluster:
    """A gateway on the loopback over local workers, and stubs that know nothing of our client."""

    server: GatewayServer
    workers: LocalWorkers
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return InferenceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def admin(self) -> Any:
        return AdminStub(self.channel)  # type: ignore[no-untyped-call]

    async def generate(self, request: GenerateRequest, **call: Any) -> Answer:
        return answer_of([reply async for reply in self.inference.Generate(request, **call)])

    async def counters(self) -> dict[tuple[str, ...], int]:
        """Return the counters of ``Stats`` by name and label values, over all tenants."""
        stats = await self.admin.Stats(admin_pb2.StatsRequest())
        found: Counter[tuple[str, ...]] = Counter()
        for c in stats.counters:
            labels = (c.labels[key] for key in sorted(c.labels) if key != "tenant")
            found[(c.name, *labels)] += c.value
        return found

    async def idle(self) -> None:
        """Return when nothing runs in the gateway or in a node."""
        async with asyncio.timeout(5):
            while self.server.gateway.num_running or self.workers.num_open:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    config: WorkerConfig,
    model: Model,
    store_address: str,
    listen: str = "127.0.0.1:0",
    **options: Any,
) -> AsyncIterator[Cluster]:
    async with running(config, store_address) as nodes:
        workers = LocalWorkers(nodes)
        server = await start_gateway(
            listen,
            store_address=store_address,
            workers=workers,
            info=await nodes.decode.info(),
            tokenizer=model.tokenizer,
            salt=b"tenant",
            **options,
        )
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Cluster(server, workers, channel)
        finally:
            await server.stop(0.2)


def request_of(
    prompt: Any = (), *, preset: str = "balanced", max_tokens: int = 8, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        preset=preset,
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True, **sampling),
    )


def error_of(error: grpc.aio.AioRpcError) -> KVStrataError:
    return from_rpc_error(error)


def has_details(error: grpc.aio.AioRpcError) -> bool:
    status = rpc_status.from_call(error)
    return status is not None and len(status.details) == 1
