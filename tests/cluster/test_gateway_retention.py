"""From a request's hint to the ranks of its blocks in the store, and back when its session ends."""

from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.protos import retention_pb2
from kvstrata.protos.retention import HIGH, LOW, NORMAL
from tests.cluster.local_workers import Cluster, request_of
from tests.prefill_node.nodes import prompt_of

PROMPT = prompt_of(200)  # three blocks; with the answer four


async def standings(store: LocalStore) -> list[tuple[int, int]]:
    """Return priority and number of sessions of every block that hints name, fewest first."""
    assert store.running is not None
    kept = store.running.store
    found = [kept.retention.standing(key) for key in await kept.dram.keys(100)]
    return sorted((s.priority, s.num_sessions) for s in found if s is not None)


async def test_a_hint_reaches_the_blocks_of_prompt_and_answer_and_ends_with_the_session(
    cluster: Cluster, store: LocalStore
) -> None:
    request = request_of(PROMPT, max_tokens=60)
    request.session_id = "talk"
    request.retention.priority = retention_pb2.PRIORITY_HIGH
    await cluster.generate(request)
    assert await standings(store) == [(HIGH, 1)] * 4
    await cluster.generate(request_of(PROMPT[:150], max_tokens=1))
    release = retention_pb2.ReleaseRequest(session="talk")
    assert (await cluster.inference.Release(release)).blocks == 4
    assert await standings(store) == [(LOW, 1)] * 2 + [(NORMAL, 1)] * 2
    counters = await cluster.counters()
    assert counters["retained_blocks_total", "high"] == 4
    assert counters["released_blocks_total",] == 4


async def test_a_hint_without_a_session_is_of_its_request_alone(
    cluster: Cluster, store: LocalStore
) -> None:
    for _ in range(2):
        request = request_of(PROMPT, max_tokens=1)
        request.retention.priority = retention_pb2.PRIORITY_LOW
        await cluster.generate(request)
    assert await standings(store) == [(LOW, 2)] * 3
    await cluster.generate(request_of(PROMPT, max_tokens=1))
    assert await standings(store) == [(NORMAL, 2)] * 3
