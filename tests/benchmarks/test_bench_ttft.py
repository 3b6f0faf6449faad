import contextlib
from pathlib import Path
from typing import Any

import bench_ttft
import pytest
import ttft_plot
import ttft_vllm

KEYS = {"bench", "system", "state", "prompt_tokens", "ttft_ms"}


def row(system: str, state: str, ttft_ms: float) -> dict[str, Any]:
    return {
        "bench": "ttft", "system": system, "state": state, "prompt_tokens": 4096,
        "ttft_ms": ttft_ms,
    }  # fmt: skip


ROWS = [
    row("kvstrata balanced", "cold", 1000.0),
    row("kvstrata balanced", "warm-redis", 90.0),
    row("kvstrata single process", "cold", 800.0),
    row("vllm + lmcache", "warm-redis", 100.0),
]


def test_marks_are_ratios_of_one_run() -> None:
    found = {line["summary"]: line["ratio"] for line in bench_ttft.marks(ROWS)}
    assert found == {
        "cold, of a single process": 1.25,
        "warm-redis, of cold": 0.09,
        "warm-redis, of vLLM + LMCache": 0.9,
    }
    assert len(bench_ttft.marks(ROWS[:2])) == 1  # without a peer there is no ratio to it


def test_no_prompt_begins_as_another() -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return list(range(100_000))

    found = bench_ttft.prompts(Tokenizer(), bench_ttft.LENGTHS, bench_ttft.ROUNDS)
    for n, texts in found.items():
        assert [len(text) for text in texts] == [n] * (bench_ttft.ROUNDS + 1)
    starts = [text[0] for texts in found.values() for text in texts]
    assert len(set(starts)) == len(starts)


def test_a_peer_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Nothing:
        name = "nothing"
        tokenizer = None

        def __init__(self, dtype: object) -> None: ...

    monkeypatch.setattr(ttft_vllm, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(bench_ttft, "SingleProcess", Nothing)
    with contextlib.ExitStack() as stack:
        asks, _ = bench_ttft.start(stack, ["single", "vllm", "lmcache"], "bfloat16")
    assert len(asks) == 1
    said = capsys.readouterr().err
    assert "vllm is left out" in said
    assert "lmcache is left out" in said


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    ttft_plot.draw(ROWS, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 1000
