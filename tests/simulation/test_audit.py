from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from firstfit_reference import first_fit_log
from hypothesis import assume, given
from hypothesis import strategies as st

from mell_ray.simulation.audit import AuditReport, audit
from mell_ray.simulation.types import TraceRow

Log = list[dict[str, Any]]
CAPACITY = 100


def check(rows: list[TraceRow], log: Log) -> AuditReport:
    return audit(rows, enumerate(log, start=1))


traces = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 50)), min_size=1, max_size=25
).map(lambda values: [TraceRow(number, float(t), p, o) for number, (t, p, o) in enumerate(values)])


@given(traces)
def test_a_right_log_passes_and_is_counted(rows: list[TraceRow]) -> None:
    log = first_fit_log(rows, CAPACITY)
    assume(log)  # without any GPU an auditor cannot know that the requests were too large
    report = check(rows, log)
    assert report.violations == []
    assert report.finished + report.too_large == len(rows)
    assert report.migrations == sum(event["event"] == "migrate" for event in log)
    lives = sum(row.output_tokens for row in rows if row.prompt_tokens + row.output_tokens <= 100)
    assert report.gpu_seconds <= lives + 1e-9
    assert report.peak_gpus <= len(rows)


@given(traces, st.data())
def test_a_line_left_out_is_noticed(rows: list[TraceRow], data: st.DataObject) -> None:
    """Growth may be skipped (it may be reported per epoch); anything else must be missed."""
    log = first_fit_log(rows, CAPACITY)
    needed = [n for n, e in enumerate(log) if e["event"] not in ("grow", "gpu_close")]
    assume(needed)
    left_out = data.draw(st.sampled_from(needed))
    assert not check(rows, log[:left_out] + log[left_out + 1 :]).ok


@given(traces, st.data())
def test_a_line_written_twice_is_noticed(rows: list[TraceRow], data: st.DataObject) -> None:
    log = first_fit_log(rows, CAPACITY)
    once = [n for n, e in enumerate(log) if e["event"] != "grow"]
    assume(once)
    twice = data.draw(st.sampled_from(once))
    assert not check(rows, log[: twice + 1] + log[twice:]).ok


@given(traces)
def test_too_small_a_gpu_is_noticed(rows: list[TraceRow]) -> None:
    """The GPUs' capacity is understated by one token below the fullest moment of any GPU."""
    log = first_fit_log(rows, CAPACITY)
    used: dict[str, dict[int, int]] = {}
    fullest = 0
    for event in log:
        for held in used.values():
            if event["event"] in ("grow", "migrate", "finish"):
                held.pop(event["request"], None)
        if event["event"] in ("place", "grow", "migrate", "finish"):
            held = used.setdefault(event.get("dst", event.get("gpu")), {})
            held[event["request"]] = event["tokens"]
            fullest = max(fullest, sum(held.values()))
            if event["event"] == "finish":
                del held[event["request"]]
    assume(fullest > 1)
    smaller = [
        {**e, "capacity_tokens": fullest - 1} if e["event"] == "gpu_open" else e for e in log
    ]
    report = check(rows, smaller)
    assert any("more than its" in v.message for v in report.violations)


def small_case() -> tuple[list[TraceRow], Log]:
    rows = [TraceRow(0, 1.0, 60, 20), TraceRow(1, 2.0, 30, 4)]
    log: Log = [
        {"t": 1.0, "event": "gpu_open", "gpu": "a", "capacity_tokens": 100},
        {"t": 1.0, "event": "place", "request": 0, "gpu": "a", "tokens": 60},
        {"t": 2.0, "event": "gpu_open", "gpu": "b", "capacity_tokens": 100},
        {"t": 2.0, "event": "place", "request": 1, "gpu": "b", "tokens": 30},
        {"t": 3.0, "event": "grow", "request": 1, "gpu": "b", "tokens": 32},
        {"t": 3.0, "event": "migrate", "request": 1, "src": "b", "dst": "a", "tokens": 32},
        {"t": 3.0, "event": "gpu_close", "gpu": "b"},
        {"t": 4.0, "event": "preempt", "request": 0, "gpu": "a", "tokens": 61},
        {"t": 5.0, "event": "finish", "request": 1, "gpu": "a", "tokens": 34},
        {"t": 5.0, "event": "place", "request": 0, "gpu": "a", "tokens": 61},
        {"t": 9.0, "event": "finish", "request": 0, "gpu": "a", "tokens": 80},
        {"t": 9.0, "event": "gpu_close", "gpu": "a"},
    ]
    return rows, log


def test_a_log_with_migration_and_preemption_passes() -> None:
    rows, log = small_case()
    report = check(rows, log)
    assert report.violations == []
    assert (report.finished, report.migrations, report.preemptions) == (2, 1, 1)
    assert (report.peak_gpus, report.migrated_tokens) == (2, 32)
    assert report.gpu_seconds == pytest.approx(9.0)


def change(index: int, **fields: Any) -> Callable[[Log], None]:
    return lambda log: log[index].update(fields)


@pytest.mark.parametrize(
    ("spoil", "line", "message"),
    [
        (change(1, t=0.5), 2, "time goes back"),
        (change(1, tokens=101), 2, "more than its 100"),
        (change(1, tokens=59), 2, "less than its prompt"),
        (change(1, gpu="b"), 2, "not open"),
        (change(1, request=7), 2, "the trace does not have"),
        (change(1, request=[0]), 2, "wrong request"),
        (change(1, event="teleport"), 2, "unknown event 'teleport'"),
        (change(1, t="soon"), 2, "no time"),
        (change(2, gpu="a"), 3, "opened twice"),
        (change(2, capacity_tokens=0), 3, "capacity 0"),
        (change(3, t=1.5), 4, "time goes back"),
        (change(4, tokens=29), 5, "shrinks"),
        (change(4, gpu="a"), 5, "grows on a, is on b"),
        (change(4, tokens=35), 5, "more than prompt + output"),
        (change(5, src="a"), 6, "leaves GPU a, is on b"),
        (change(5, dst="c"), 6, "not open"),
        (change(6, gpu="a"), 7, "closed with 2 requests"),
        (change(8, tokens=33), 9, "finishes with 33 tokens, not 34"),
        (change(8, gpu="b"), 9, "finishes on GPU b, is on a"),
        (lambda log: log[4].pop("tokens"), 5, "grow has no tokens"),
        (lambda log: log.insert(9, {**log[8]}), 10, "finishes twice"),
        (lambda log: log.pop(8), 0, "request 1 never finished"),
    ],
)
def test_each_broken_rule_is_reported_with_its_line(
    spoil: Callable[[Log], None], line: int, message: str
) -> None:
    rows, log = small_case()
    spoil(log)
    report = check(rows, log)
    assert not report.ok
    assert any(v.line == line and message in v.message for v in report.violations), [
        str(v) for v in report.violations
    ]


def test_a_request_placed_before_it_arrives_is_reported() -> None:
    rows, log = small_case()
    rows[0] = TraceRow(0, 1.5, 60, 20)
    assert "arrives at 1.5" in str(check(rows, log).violations[0])


def test_all_violations_are_counted_and_the_first_are_kept() -> None:
    rows = [TraceRow(number, 0.0, 1, 1) for number in range(50)]
    report = audit(rows, [], max_violations=3)
    assert report.num_violations == 50
    assert len(report.violations) == 3
