"""Looking into the service through its gateway, and shutting that down."""

import asyncio
import json
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from kvstrata.client.kvctl import app
from kvstrata.engine import Model
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerConfig
from kvstrata.protos import admin_pb2, kvstore_pb2
from kvstrata.protos.errors import BlockNotFoundError, DrainingError, UnavailableError
from kvstrata.protos.inference_pb2 import GenerateRequest
from tests.cluster.local_workers import Cluster, error_of, request_of, serving
from tests.prefill_node.nodes import prompt_of

PROMPT = prompt_of(200)


async def test_stats_join_the_store_and_the_gateway(cluster: Cluster) -> None:
    await cluster.generate(request_of(PROMPT))
    stats = await cluster.admin.Stats(admin_pb2.StatsRequest())
    assert stats.health == "ok"
    assert [tier.tier for tier in stats.tiers] == ["dram"]
    assert stats.tiers[0].blocks == 3
    assert stats.uptime_s > 0
    counters = await cluster.counters()
    assert counters["requests_total", "ok"] == 1
    assert counters["puts_total", "committed", ""] == 3
    assert counters["calls_total", "OK", "Inference/Generate"] == 1
    timed = {(h.name, h.labels.get("method")): sum(h.counts) for h in stats.histograms}
    assert timed["call_seconds", "Inference/Generate"] == 1
    assert timed["call_seconds", "KVStore/Lookup"] == 1


async def test_explain_takes_a_prompt_and_knows_the_presets(cluster: Cluster) -> None:
    await cluster.generate(request_of(PROMPT))

    async def explain(request: GenerateRequest) -> admin_pb2.ExplainReply:
        asked = admin_pb2.ExplainRequest(prompt=request)
        reply: admin_pb2.ExplainReply = await cluster.admin.Explain(asked)
        return reply

    found = await explain(request_of(PROMPT))
    assert (found.run, len(found.blocks), found.prompt_tokens) == (3, 3, 200)
    assert (found.codec, list(found.others)) == ("fallback/2", [])
    longer = await explain(request_of([*PROMPT[:128], *PROMPT]))
    assert (longer.run, len(longer.blocks)) == (2, 5)
    exact = await explain(request_of(PROMPT, preset="exact"))
    assert (exact.run, exact.codec) == (0, "exact/1")
    assert {o.preset: o.run for o in exact.others} == {"balanced": 3}
    keys = [block.listing.key for block in found.blocks]
    await cluster.admin.Evict(admin_pb2.EvictRequest(keys=keys[1:2]))
    found = await explain(request_of(PROMPT))
    assert (found.run, [d.reason for d in found.blocks[1].departures]) == (1, ["admin"])
    assert list(found.blocks[2].listing.tiers) == ["dram"]


async def test_kvctl_explains_a_prompt_through_the_gateway(cluster: Cluster) -> None:
    await cluster.generate(request_of(PROMPT))
    ids = ",".join(map(str, PROMPT))

    async def kvctl(*args: str) -> dict[str, Any]:
        command = [*args, "--address", cluster.server.address, "--json"]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    found = await kvctl("lookup", "--token-ids", ids)
    assert (found["run"], found["num_blocks"], found["prompt_tokens"]) == (3, 3, 200)
    found = await kvctl("explain", "--token-ids", ids, "--preset", "exact")
    assert found["why"].endswith("stored with another preset: balanced, not exact")
    assert found["others"][0]["differs"][1] == "codec: fallback/2, not exact/1"
    found = await kvctl("explain", "some text")
    assert found["why"].startswith("no full block of 64 tokens")


async def test_every_verb_reaches_the_store_through_the_gateway(cluster: Cluster) -> None:
    await cluster.generate(request_of(PROMPT))
    (first, *_) = (await cluster.admin.ListBlocks(admin_pb2.ListBlocksRequest())).blocks
    pin = kvstore_pb2.PinRequest(keys=[first.key], ttl_ms=60_000)
    assert not (await cluster.admin.Pin(pin)).missing
    assert (await cluster.admin.Evict(admin_pb2.EvictRequest())).skipped_pinned == 1
    await cluster.admin.Unpin(kvstore_pb2.UnpinRequest(keys=[first.key]))
    replies = [r async for r in cluster.admin.Verify(admin_pb2.VerifyRequest())]
    assert (replies[-1].done, replies[-1].checked_blocks) == (True, 1)
    inspected = await cluster.admin.Inspect(admin_pb2.InspectRequest(key=first.key, tokens=True))
    assert [len(layer.saliency) for layer in inspected.layers] == [64] * len(inspected.layers)
    assert inspected.layers
    (tenant,) = (await cluster.admin.Quota(admin_pb2.QuotaRequest())).tenants
    assert tenant.tenant == "default"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.admin.Move(admin_pb2.MoveRequest(keys=[first.key], target="ssd"))
    assert "no tier 'ssd'" in str(caught.value.details())


async def test_stats_are_answered_without_a_store(config: WorkerConfig, model: Model) -> None:
    async with LocalStore() as store, serving(config, model, store.address) as cluster:
        await cluster.generate(request_of(PROMPT))
        await store.running.stop(0.1)
        stats = await cluster.admin.Stats(admin_pb2.StatsRequest())
        assert stats.health.startswith("degraded: store: ")
        assert [c.name for c in stats.counters].count("requests_total") == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.admin.ListBlocks(admin_pb2.ListBlocksRequest())
        error = error_of(caught.value)
        assert isinstance(error, UnavailableError)
        assert error.remedy
        assert len((await cluster.generate(request_of(PROMPT))).tokens) == 8


async def test_blocks_are_listed_inspected_and_evicted(cluster: Cluster) -> None:
    await cluster.generate(request_of(PROMPT))
    page = await cluster.admin.ListBlocks(admin_pb2.ListBlocksRequest(page_size=2))
    assert len(page.blocks) == 2
    assert page.next_page_token
    inspected = await cluster.admin.Inspect(admin_pb2.InspectRequest(key=page.blocks[0].key))
    assert [h.codec for h in inspected.headers] == ["fallback", "fallback"]
    assert (await cluster.admin.Evict(admin_pb2.EvictRequest())).evicted == 3
    again = await cluster.generate(request_of(PROMPT))
    assert again.cache.cached_tokens == 0


async def test_errors_of_the_store_come_through_as_they_are(cluster: Cluster) -> None:
    key = kvstore_pb2.BlockKey(scope=b"s" * 16, block_hash=b"h" * 16)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.admin.Inspect(admin_pb2.InspectRequest(key=key))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert isinstance(error_of(caught.value), BlockNotFoundError)


async def test_draining_lets_what_runs_finish_and_refuses_the_rest(cluster: Cluster) -> None:
    whole = await cluster.generate(request_of(PROMPT, max_tokens=30))
    cluster.workers.pause_s = 0.02
    running = asyncio.create_task(cluster.generate(request_of(PROMPT, max_tokens=30)))
    while not cluster.workers.num_open:
        await asyncio.sleep(0.01)
    early = await cluster.admin.Drain(admin_pb2.DrainRequest(timeout_ms=50))
    assert (early.drained, early.in_flight) == (False, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(PROMPT))
    error = error_of(caught.value)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error, DrainingError)
    assert error.remedy
    late = await cluster.admin.Drain(admin_pb2.DrainRequest(timeout_ms=20_000))
    assert (late.drained, late.in_flight) == (True, 0)
    assert (await running).tokens == whole.tokens
    assert (await cluster.admin.Stats(admin_pb2.StatsRequest())).health == "draining"


async def test_health_follows_draining(cluster: Cluster) -> None:
    health = health_pb2_grpc.HealthStub(cluster.channel)
    for name in ("", "kvstrata.v1.Inference", "kvstrata.v1.Admin"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    await cluster.admin.Drain(admin_pb2.DrainRequest())
    reply = await health.Check(health_pb2.HealthCheckRequest(service="kvstrata.v1.Inference"))
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_stopping_cuts_what_does_not_end(cluster: Cluster) -> None:
    cluster.workers.pause_s = 0.05
    running = asyncio.create_task(cluster.generate(request_of(PROMPT, max_tokens=300)))
    while not cluster.workers.num_open:
        await asyncio.sleep(0.01)
    await asyncio.wait_for(cluster.server.stop(0.1), 5)
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(running, 5)
    await cluster.idle()
