"""What the gateway counts of requests, beside what the store counts of the same bytes."""

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from kvstrata.engine import Model
from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerConfig
from tests.cluster.local_workers import Cluster, request_of, serving
from tests.prefill_node.nodes import prompt_of

PROMPT = prompt_of(400)  # six full blocks, long enough for a prefill node


async def scrape(cluster: Cluster) -> dict[tuple[str, ...], float]:
    """Return every sample by name and label values, labels in order."""
    url = f"http://{cluster.server.metrics_address}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return str(reply.read().decode())

    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
    }


async def test_the_sums_of_a_cold_and_a_warm_request_agree(
    config: WorkerConfig, model: Model
) -> None:
    async with (
        LocalStore() as store,
        serving(config, model, store.address, metrics_listen="127.0.0.1:0") as cluster,
    ):
        cold = await cluster.generate(request_of(PROMPT, max_tokens=9))
        warm = await cluster.generate(request_of(PROMPT, max_tokens=9))
        await cluster.generate(request_of(PROMPT[:200], max_tokens=1))
        found = await scrape(cluster)

    def count(name: str, *labels: str) -> float:
        return found.get((f"kvstrata_gateway_{name}", *labels), 0)

    assert count("up") == 1
    assert count("requests_total", "ok", "default") == 3
    assert count("prompt_tokens_total", "default") == 1000
    assert count("cached_tokens_total", "default") == 6 * 64 + 3 * 64
    assert count("computed_tokens_total", "default") == 1000 - 9 * 64
    assert count("generated_tokens_total", "default") == len(cold.tokens) + len(warm.tokens) + 1
    assert count("ttft_seconds_count", "none") == 1
    assert count("ttft_seconds_count", "all") == 2
    assert count("tpot_seconds_count") == 2  # not of the request with one token
    assert count("tpot_seconds_sum") > 0
    assert count("committed_blocks_total") == 6
    assert count("stage_seconds_count", "prefill", "compress") == 1
    assert count("stage_seconds_count", "gateway", "route") == 3
    assert count("stage_seconds_count", "decode", "fetch") == 3
    assert count("read_plans_total", "full", "decode") == 3
    nodes = {key[1]: value for key, value in found.items() if key[0].endswith("_node_pool_bytes")}
    assert nodes["decode"] > 0
    assert nodes["prefill"] > 0
    assert count("running_requests") == count("running_bytes") == 0
    assert count("calls_total", "OK", "Inference/Generate", "default") == 3
    stored = store.running.store.counters
    assert count("fetched_bytes_total") == stored.get(names.SENT_BYTES) > 0
    assert count("published_bytes_total") == stored.get(names.RECEIVED_BYTES) > 0
    assert stored.get(names.HITS) == stored.get(names.WANTED)


async def test_recomputes_and_their_tokens_are_counted_by_reason(
    config: WorkerConfig, model: Model
) -> None:
    async with (
        LocalStore() as store,
        serving(config, model, store.address, metrics_listen="127.0.0.1:0") as cluster,
    ):
        await cluster.generate(request_of(PROMPT, preset="exact"))
        await store.running.stop(0.1)
        lost = await cluster.generate(request_of(PROMPT, preset="exact"))
        found = await scrape(cluster)
    assert lost.reasons
    for reason, tokens in lost.reasons.items():
        assert found["kvstrata_gateway_recomputes_total", reason] == 1
        assert found["kvstrata_gateway_recomputed_tokens_total", reason] == tokens
