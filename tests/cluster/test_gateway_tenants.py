"""Tenants at the gateway: one model, one store, and nothing shared between them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.cluster.gateway_server import start_gateway
from kvstrata.cluster.processes import service_tenant
from kvstrata.engine import Model
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerConfig
from kvstrata.protos import admin_pb2, inference_pb2, kvstore_pb2, retention_pb2
from kvstrata.protos.errors import ThrottledError
from kvstrata.protos.service import call_metadata
from tests.cluster.local_workers import Cluster, LocalWorkers, error_of, request_of
from tests.kvstore_service.tenancy import credentials, tenants_file
from tests.prefill_node.nodes import prompt_of, running

PROMPT = prompt_of(200)


@pytest.fixture
async def shared(config: WorkerConfig, model: Model, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A gateway of two tenants and an operator."""
    slow = "requests_per_s = 0.01"
    tenants = tenants_file(tmp_path, alice="", bob="", ops="admin = true", slow=slow)
    async with LocalStore() as store, running(config, store.address) as nodes:
        workers = LocalWorkers(nodes)
        server = await start_gateway(
            "127.0.0.1:0",
            store_address=store.address,
            workers=workers,
            info=await nodes.decode.info(),
            tokenizer=model.tokenizer,
            tenants=tenants,
        )
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Cluster(server, workers, channel)
        finally:
            await server.stop(0.2)


def shown(name: str) -> dict[str, Any]:
    return {"metadata": call_metadata(credentials(name))}


async def test_no_tenant_hits_what_another_one_published(shared: Cluster) -> None:
    request = request_of(PROMPT)
    request.session_id = "the same session"
    cached = [
        (await shared.generate(request, **shown(name))).cache.cached_tokens
        for name in ("alice", "bob", "alice", "bob")
    ]
    assert cached == [0, 0, 192, 192]
    listing = await shared.admin.ListBlocks(admin_pb2.ListBlocksRequest(), **shown("ops"))
    assert len(listing.blocks) == 6
    assert len({block.key.scope for block in listing.blocks}) == 2
    salts = {task.salt for task in shared.workers.decodes}
    assert len(salts) == 2
    assert all(len(salt) == 32 for salt in salts)


@pytest.mark.parametrize(
    ("call", "code"),
    [({}, "UNAUTHENTICATED"), (shown("mallory"), "UNAUTHENTICATED"), (shown("bob"), "OK")],
)
async def test_a_request_needs_a_known_token(
    shared: Cluster, call: dict[str, Any], code: str
) -> None:
    generate = shared.inference.Generate(request_of(PROMPT, max_tokens=1), **call)
    with contextlib.suppress(grpc.RpcError):
        assert [reply async for reply in generate]
    assert (await generate.code()).name == code
    model = shared.inference.GetModel(inference_pb2.GetModelRequest(), **call)
    assert (await model.code()).name == code
    release = shared.inference.Release(retention_pb2.ReleaseRequest(session="s"), **call)
    assert (await release.code()).name == code


async def test_nobody_releases_another_tenants_session(shared: Cluster) -> None:
    request = request_of(PROMPT, max_tokens=1)
    request.retention.priority = retention_pb2.PRIORITY_HIGH
    request.session_id = "s"
    await shared.generate(request, **shown("alice"))
    release = retention_pb2.ReleaseRequest(session="s", account="alice")
    assert (await shared.inference.Release(release, **shown("bob"))).blocks == 0
    assert (await shared.inference.Release(release, **shown("alice"))).blocks == 3


def test_every_call_of_tenants_is_tried_above() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    assert [method.name for method in service.methods] == ["Generate", "GetModel", "Release"]


ADMIN = [method.name for method in admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods]


@pytest.mark.parametrize("name", ADMIN)
async def test_admin_is_for_the_operator(shared: Cluster, name: str) -> None:
    kind = f"{name}Request"
    request = getattr(admin_pb2 if hasattr(admin_pb2, kind) else kvstore_pb2, kind)()
    call = getattr(shared.admin, name)(request, **shown("bob"))
    assert (await call.code()).name == "PERMISSION_DENIED"
    assert (await shared.admin.Stats(admin_pb2.StatsRequest(), **shown("ops"))).health == "ok"


async def test_a_tenant_that_asks_too_often_is_told_when_to_come_again(shared: Cluster) -> None:
    request = request_of(PROMPT, max_tokens=1)
    await shared.generate(request, **shown("slow"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await shared.generate(request, **shown("slow"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_of(caught.value)
    assert isinstance(error, ThrottledError)
    assert 90 < error.retry_after_s <= 100
    await shared.generate(request, **shown("alice"))
    stats = await shared.admin.Stats(admin_pb2.StatsRequest(), **shown("ops"))
    refusals = [dict(c.labels) for c in stats.counters if c.name == "refusals_total"]
    assert refusals == [{"tenant": "slow", "reason": "rate"}]


async def test_an_operator_explains_another_tenants_prompt_and_limits_it(shared: Cluster) -> None:
    await shared.generate(request_of(PROMPT), **shown("alice"))

    async def run(tenant: str) -> int:
        request = admin_pb2.ExplainRequest(prompt=request_of(PROMPT), tenant=tenant)
        return int((await shared.admin.Explain(request, **shown("ops"))).run)

    assert [await run("alice"), await run("bob"), await run("")] == [3, 0, 0]
    limit = admin_pb2.QuotaRequest(tenant="alice", requests_per_s=0.01)
    (told,) = (await shared.admin.Quota(limit, **shown("ops"))).tenants
    assert (told.tenant, told.requests_per_s) == ("alice", 0.01)
    await shared.generate(request_of(PROMPT, max_tokens=1), **shown("alice"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await shared.generate(request_of(PROMPT, max_tokens=1), **shown("alice"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_stacks_own_store_lets_only_the_stack_in(tmp_path: Path) -> None:
    path, own = service_tenant(tmp_path)
    assert Path(path).stat().st_mode & 0o077 == 0
    assert own.token not in Path(path).read_text()
    assert Tenants(path).identify(own.metadata).is_admin
    async with LocalStore(StoreConfig(tenants=path)) as store:
        assert store.running.tenants.identify(own.metadata).name == "stack"
