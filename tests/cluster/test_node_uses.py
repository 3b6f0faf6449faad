from kvstrata.cluster.node_uses import KEPT_S, MAX_WORKERS, NodeUses
from kvstrata.protos.inference_pb2 import NodeUse


def use(worker: str = "a:1", *, used: int = 10, gpu: int = 0) -> NodeUse:
    return NodeUse(
        node="decode", worker=worker, pool_bytes=100, pool_used_bytes=used, parked=3, gpu_bytes=gpu,
        gpu_used_bytes=gpu // 2, gpu_busy=0.25 if gpu else 0.0, graph_passes=7,
        graph_failed_passes=2, late_copies=1,
    )  # fmt: skip


def numbers(uses: NodeUses, worker: str) -> dict[str, float]:
    return {g.name: g.value for g in uses.gauges() if g.labels["worker"] == worker}


def test_the_newest_report_of_each_worker_counts() -> None:
    uses = NodeUses()
    uses.note([use(), use("b:2", gpu=80)])
    uses.note([use(used=20)])
    assert numbers(uses, "a:1") == {
        "node_pool_bytes": 100,
        "node_pool_used_bytes": 20,
        "node_parked_sequences": 3,
        "node_expired_requests": 0,
    }
    assert numbers(uses, "b:2")["node_gpu_used_bytes"] == 40
    assert numbers(uses, "b:2")["node_gpu_busy_ratio"] == 0.25
    assert numbers(uses, "b:2")["node_graph_passes"] == 7
    assert numbers(uses, "b:2")["node_graph_failed_passes"] == 2
    assert numbers(uses, "b:2")["node_late_copies"] == 1
    assert {g.labels["node"] for g in uses.gauges()} == {"decode"}


def test_workers_that_fell_silent_are_forgotten_and_their_number_is_bounded() -> None:
    clock = [0.0]
    uses = NodeUses(lambda: clock[0])
    uses.note([use()])
    clock[0] = KEPT_S + 1
    assert uses.gauges() == []
    uses.note(use(f"w:{i}") for i in range(MAX_WORKERS + 5))
    workers = {g.labels["worker"] for g in uses.gauges()}
    assert len(workers) == MAX_WORKERS
    assert "w:0" not in workers
