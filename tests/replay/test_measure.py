from __future__ import annotations

import json
import re

import pytest

from mell_ray.replay.charts import distribution, line_chart
from mell_ray.replay.client import general
from mell_ray.replay.html import render_html
from mell_ray.replay.measure import (
    LATE_S,
    as_json,
    count_errors,
    is_late,
    running_over_time,
    spread_ms,
    summarise,
)
from mell_ray.replay.report import notes
from mell_ray.replay.sse import SseLines
from mell_ray.replay.types import Failure, Job, Outcome, Slo, Spread


def outcome(
    at: float, pieces: list[float], *, sent: float | None = None, failure: Failure | None = None
) -> Outcome:
    """An answer with a token at each of ``pieces``, seconds after the start."""
    done = Outcome(Job(0, at, 10, len(pieces)), sent_s=at if sent is None else sent)
    for piece in pieces:
        done.piece(piece)
    done.tokens = len(pieces)
    done.end_s = pieces[-1] if pieces else done.sent_s + 1.0
    done.failure = failure
    return done


def test_latencies_of_one_answer() -> None:
    done = outcome(1.0, [1.5, 1.6, 2.1])
    assert done.ttft_s == pytest.approx(0.5)
    assert done.tpot_s == pytest.approx(0.3)
    assert list(done.gaps_s) == pytest.approx([0.1, 0.5])


def test_ttft_counts_from_sending_and_lateness_is_told_apart() -> None:
    done = outcome(1.0, [2.0], sent=1.4)
    assert done.ttft_s == pytest.approx(0.6)
    assert done.late_s == pytest.approx(0.4)
    assert done.tpot_s is None


def test_percentiles() -> None:
    spread = spread_ms(n / 1e3 for n in range(101))
    assert (spread.p50, spread.p90, spread.p99) == pytest.approx((50, 90, 99))
    assert (spread.mean, spread.max) == pytest.approx((50, 100))
    assert spread_ms([]) == Spread()


def test_goodput_needs_both_limits_and_a_whole_answer() -> None:
    slo = Slo(ttft_ms=500, tpot_ms=100)
    outcomes = [
        outcome(0.0, [0.5, 0.6]),  # on both limits
        outcome(0.0, [0.6, 0.65]),  # first token too late
        outcome(0.0, [0.1, 0.25]),  # too slow after it
        outcome(0.0, [0.4]),  # a single token has no TPOT
        outcome(0.0, [0.1, 0.15], failure=Failure("HTTP 500", "HTTP 500")),
        outcome(0.0, [2.0]),
    ]
    outcomes[0].last_s = 0.6
    summary = summarise(outcomes, slo)
    assert summary.good == 2
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.goodput_per_s == pytest.approx(1.0)
    assert (summary.requests, summary.ok, summary.failed) == (6, 5, 1)


def test_throughput_counts_tokens_over_the_whole_run() -> None:
    summary = summarise([outcome(0.0, [1.0, 2.0]), outcome(1.0, [3.0, 4.0])], Slo())
    assert summary.output_tokens_per_s == pytest.approx(1.0)
    assert summary.requests_per_s == pytest.approx(0.5)
    assert summary.prompt_tokens == 20


def test_failed_answers_leave_latencies_alone() -> None:
    failed = outcome(0.0, [50.0, 90.0], failure=Failure("timeout", "no whole answer in 90 s"))
    summary = summarise([outcome(0.0, [0.1, 0.2]), failed], Slo())
    assert summary.ttft_ms.max == pytest.approx(100)
    assert summary.itl_ms.max == pytest.approx(100)


def test_errors_are_counted_by_kind_with_an_example() -> None:
    failures = [
        Failure(general(f"HTTP 400: {n} tokens"), f"HTTP 400: {n} tokens") for n in (7, 5, 8)
    ]
    counted = count_errors(
        [outcome(0, [], failure=f) for f in [Failure("timeout", "t"), *failures]]
    )
    assert [(e.kind, e.count) for e in counted] == [("HTTP #: # tokens", 3), ("timeout", 1)]
    assert counted[0].example == "HTTP 400: 7 tokens"


def test_running_requests_over_time() -> None:
    outcomes = [outcome(0.0, [2.0]), outcome(1.0, [3.0]), outcome(2.0, [2.5])]
    assert running_over_time(outcomes) == [
        (0.0, 1),
        (1.0, 2),
        (2.0, 1),
        (2.0, 2),
        (2.5, 1),
        (3.0, 0),
    ]
    assert summarise(outcomes, Slo()).peak_running == 2


def test_a_slow_client_is_noticed() -> None:
    on_time = [outcome(float(n), [n + 0.5]) for n in range(99)]
    late = outcome(99.0, [101.0], sent=99.0 + 2 * LATE_S)
    assert not is_late(summarise([*on_time, late], Slo()))
    slow = summarise([*on_time, late, late], Slo())
    assert is_late(slow)
    assert slow.late_starts == 2
    assert any("too slow" in note for note in notes(slow))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_sse_payloads_do_not_depend_on_how_bytes_arrive(size: int) -> None:
    stream = (
        b': hello\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\ndata: half'
    )
    lines = SseLines()
    found = []
    for start in range(0, len(stream), size):
        found += lines.feed(stream[start : start + size])
    assert found == [b'{"a": 1}', b"two", b"[DONE]"]


def test_json_has_every_figure_and_is_plain() -> None:
    summary = summarise([outcome(0.0, [], failure=Failure("x", "y"))], Slo())
    told = json.loads(json.dumps(as_json(summary, {"trace": "t"}), allow_nan=False))
    assert told["trace"] == "t"
    assert told["failed"] == 1
    assert told["ttft_ms"]["p99"] is None
    assert told["errors"] == [{"kind": "x", "count": 1, "example": "y"}]


def test_html_is_one_file_that_escapes_what_servers_say() -> None:
    bad = "<script>alert(1)</script>"
    outcomes = [outcome(0.0, [0.1, 0.2]), outcome(0.5, [], failure=Failure(bad, bad))]
    page = render_html("t", summarise(outcomes, Slo()), outcomes, {"url": "u", "seconds": None})
    assert bad not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    assert not re.search(r"(?:src|href)=", page)


def test_charts_stay_inside_their_frame() -> None:
    points = distribution([float(n) for n in range(5000)])
    assert points[-1] == (4999.0, 1.0)
    assert len(points) <= 402
    line = re.search(r'<polyline points="([^"]+)"', line_chart(points, "x", percent=True))
    assert line is not None
    for pair in line[1].split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 760
        assert 0 <= y <= 240
    assert line_chart([], "x", percent=True) == ""


def test_an_interrupted_replay_counts_its_whole_time() -> None:
    ended = Outcome(Job(0, 0.0, 5, 5), sent_s=0.0, first_s=0.1, last_s=0.1, end_s=0.1, tokens=5)
    assert summarise([ended], Slo(), left_out=1, ran_s=10.0).requests_per_s == pytest.approx(0.1)
    assert summarise([ended], Slo(), ran_s=10.0).duration_s == pytest.approx(0.1)
