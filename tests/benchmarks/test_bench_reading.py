from pathlib import Path

import bench_reading
import pytest
import reading_plot
import torch

from kvstrata.prefill_node.read_plan import ReadPlan


def told(first_s: float, refined_s: float, shift: float) -> bench_reading.Told:
    logits = torch.zeros(bench_reading.ANSWER_TOKENS, 4)
    logits[:, 0] += shift
    return bench_reading.Told(first_s, refined_s, 32, logits.log_softmax(-1))


def test_rows_are_medians_and_say_what_was_chosen(tmp_path: Path) -> None:
    answers = {
        "full": [told(2.0, 0.0, 1.0), told(4.0, 0.0, 1.0), told(3.0, 0.0, 1.0)],
        "refine": [told(1.0, 2.5, 1.5)] * 3,
        "fewer_strata": [told(1.0, 0.0, 2.0)] * 3,
        "recompute": [told(5.0, 0.0, 1.0)] * 3,
    }
    chosen = {
        "patient": ReadPlan("full", 32, 32, predicted_s=3.0),
        "hasty": ReadPlan("refine", 32, 32, predicted_s=1.5),
        "hasty, short": ReadPlan("fewer_strata", 32, 32, predicted_s=1.5),
    }
    rows = list(bench_reading._rows("fallback", 8.0, answers, chosen))
    assert [row["choice"] for row in rows] == list(bench_reading.CHOICES)
    full, refine, fewer, recompute = rows
    assert (full["ttft_ms"], full["chosen_for"], full["predicted_ms"]) == (3000, ["patient"], 3000)
    assert (refine["refined_ms"], refine["chosen_for"]) == (2500, ["hasty"])
    assert recompute["chosen_for"] == []
    assert full["kl_first"] == recompute["kl_second_half"] == 0
    assert fewer["kl_first_half"] > refine["kl_first_half"] > 0
    assert len(refine["kl_by_token"]) == bench_reading.ANSWER_TOKENS
    reading_plot.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    bench_reading.show(rows)


def test_kl_is_that_of_the_definition() -> None:
    wanted, got = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert float(bench_reading._kl(wanted, got)) == pytest.approx(float(expected))
