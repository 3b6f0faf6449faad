from typing import Any

import bench_decode


def row(system: str, tokens_per_s: float, p99: float, kv: int) -> dict[str, Any]:
    return {
        "bench": "decode", "system": system, "batch": 8, "cached_tokens": 2048,
        "tokens_per_s": tokens_per_s, "tpot_p99_ms": p99, "kv_bytes": kv, "dtype": "bfloat16",
    }  # fmt: skip


def test_a_row_has_the_times_between_tokens_and_leaves_the_first_out() -> None:
    steps = [0.0, 1.0, 2.0, 2.01, 2.03, 2.06]
    found = bench_decode.figures("any", 8, 2048, steps, 7)
    assert found["tokens_per_s"] == 400.0  # 8 tokens every 20 ms
    assert (found["tpot_p50_ms"], found["tpot_p99_ms"]) == (20.0, 30.0)
    assert found["kv_bytes"] == 7


def test_shares_are_of_one_point() -> None:
    rows = [
        row("kvstrata balanced", 100.0, 20.0, 300),
        row("kvstrata balanced" + bench_decode.DISTURBED, 60.0, 44.0, 300),
        row("transformers DynamicCache", 25.0, 90.0, 1200),
        row("vllm", 80.0, 25.0, 1200),
    ]
    point = {"bench": "decode", "batch": 8, "cached_tokens": 2048}
    assert bench_decode.summary(rows) == [
        point
        | {"summary": "kvstrata balanced", "times_transformers": 4.0, "times_vllm": 1.25}
        | {"kv_of_bf16": 0.25},
        point | {"summary": "kvstrata balanced, prompts arriving", "p99_of_undisturbed": 2.2},
    ]
    assert bench_decode.summary([rows[0], rows[3]]) == []  # without transformers no share of it


def test_the_run_in_the_middle_stands_for_all() -> None:
    found = bench_decode.median([row("a", rate, 1.0, 1) for rate in (3.0, 1.0, 2.0)])
    assert found["tokens_per_s"] == 2.0
    assert found["tokens_per_s_min_max"] == [1.0, 3.0]


def test_every_point_is_within_the_model() -> None:
    for batch, cached in [*bench_decode.POINTS, *bench_decode.ARRIVING.values()]:
        assert batch in (1, 8, 16)
        assert cached + 1 + bench_decode.NUM_TOKENS <= 8192
    assert set(bench_decode.ARRIVING) <= {"balanced", "exact"}
