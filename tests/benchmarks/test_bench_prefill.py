"""What `make bench-prefill` times: whole passes, and how much of them is attention."""

import bench_prefill

from kvstrata.engine import Model
from tests.benchmarks.test_codec_measures import model
from tests.engine.test_sequence import one_thread

__all__ = ["model", "one_thread"]


def test_rows_tell_what_was_kept_and_attention_is_part_of_the_pass(model: Model) -> None:
    ids = [3 + i * i % 80 for i in range(300)]
    steps: list[None] = []
    found = bench_prefill.rows_of(model, ids, 2, lambda: steps.append(None))
    assert len(steps) == 2 * len(found)
    assert [row["budget"] for row in found] == [1.0, *bench_prefill.TAUS]
    for row in found:
        assert 0 < row["attention_ms"] < row["prefill_ms"]
        assert row["operations"] <= row["kept"] <= 1
    assert found[0]["attention_speedup"] == found[0]["kept"] == 1
    assert found[-1]["kept"] < found[1]["kept"] < 1


def test_a_run_of_fewer_rounds_is_not_kept() -> None:
    assert not bench_prefill.parse([]).no_save
    assert bench_prefill.parse(["--rounds", "1"]).no_save
    assert bench_prefill.parse(["--quick"]).no_save
