"""Reports: stages, recomputes, and the reports of several nodes in one."""

import time

import pytest

from kvstrata.protos.inference_pb2 import CacheReport, Recompute, StageTime
from kvstrata.protos.report import ReportClock, merge_reports


def test_a_stage_is_recorded_also_when_its_body_raises() -> None:
    clock = ReportClock("prefill")
    before = time.time()
    with pytest.raises(RuntimeError, match="no"), clock.stage("fetch"):
        raise RuntimeError("no")
    with clock.stage("decompress"):
        time.sleep(0.01)
    first, second = clock.report.stages
    assert [(s.stage, s.node) for s in (first, second)] == [
        ("fetch", "prefill"),
        ("decompress", "prefill"),
    ]
    assert before - 1 < first.start_unix_s <= second.start_unix_s <= time.time() + 1
    assert first.seconds >= 0
    assert 0.01 <= second.seconds < 60


def test_recomputes_carry_reason_and_tokens_and_no_blocks_leave_no_trace() -> None:
    clock = ReportClock("decode")
    clock.recompute("evicted", 65)
    clock.unencodable(0)
    clock.unencodable(2)
    assert list(clock.report.recomputes) == [
        Recompute(reason="evicted", tokens=65),
        Recompute(reason="unencodable", tokens=128),
    ]


def test_merging_adds_bytes_and_lists_and_lets_the_last_word_win() -> None:
    into = CacheReport(
        prompt_tokens=200,
        cached_tokens=128,
        bytes_fetched=10,
        bytes_published=1,
        tier="ram",
        precision="exact",
        committed_blocks=2,
        stages=[StageTime(stage="route", node="gateway")],
        recomputes=[Recompute(reason="absent", tokens=64)],
    )
    other = CacheReport(
        cached_tokens=64,
        bytes_fetched=5,
        bytes_published=7,
        tier="redis",
        committed_blocks=1,
        stages=[StageTime(stage="fetch", node="decode")],
        recomputes=[Recompute(reason="corrupt", tokens=64)],
    )
    kept = CacheReport()
    kept.CopyFrom(other)
    merge_reports(into, other)
    assert other == kept
    assert (into.bytes_fetched, into.bytes_published, into.committed_blocks) == (15, 8, 3)
    assert [s.stage for s in into.stages] == ["route", "fetch"]
    assert [r.reason for r in into.recomputes] == ["absent", "corrupt"]
    assert (into.tier, into.cached_tokens) == ("redis", 64)
    # What the other report does not say stays.
    assert (into.prompt_tokens, into.precision) == (200, "exact")


def test_merging_an_empty_report_changes_nothing() -> None:
    into = CacheReport(bytes_fetched=3, tier="ram", stages=[StageTime(stage="route")])
    kept = CacheReport()
    kept.CopyFrom(into)
    merge_reports(into, CacheReport())
    assert into == kept
    empty = CacheReport()
    merge_reports(empty, into)
    assert empty == kept
