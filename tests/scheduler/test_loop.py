"""The simulation's loop: its log stands up to an independent audit, its sums are right."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from mell_ray.errors import ConfigError
from mell_ray.scheduler import policy_names
from mell_ray.simulation.audit import Auditor
from mell_ray.simulation.loop import Simulation, simulate
from mell_ray.simulation.transform import (
    compress,
    drop_larger,
    prepare,
    spread_ties,
    superpose,
)
from mell_ray.simulation.types import SimOptions, TraceRow


class Log:
    def __init__(self) -> None:
        self.events: list[dict] = []

    def emit(self, t: float, event: str, **fields: object) -> None:
        self.events.append({"t": t, "event": event, **fields})


def service(count: int = 250, seed: int = 1) -> list[TraceRow]:
    rng, t, rows = Random(seed), 0.0, []
    for i in range(count):
        t += rng.expovariate(6.0)
        prompt = min(int(rng.lognormvariate(5.5, 0.9)) + 1, 3000)
        rows.append(TraceRow(i, t, prompt, rng.randint(1, 500)))
    return rows


OPTIONS = SimOptions(gpu_tokens=4000, seed=1)


def run(rows: list[TraceRow], **changes: object):
    options = SimOptions(**{**OPTIONS.__dict__, **changes})
    log = Log()
    result = simulate(rows, options, sink=log)
    auditor = Auditor(rows)
    for number, event in enumerate(log.events, start=1):
        auditor.feed(number, event)
    report = auditor.close()
    assert report.ok, [str(v) for v in report.violations]
    assert result.finished == len(rows)
    return result, log, report


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"report_tokens": 2},
        {"startup_s": 3.0, "idle_grace_s": 3.0},
        {"startup_s": 3.0, "forecast": True},
        {"max_gpus": 5},
        {"link_bytes_per_s": 2e8, "link_latency_s": 0.05, "prefill_tokens_per_s": 3000.0},
        {"gpus_per_node": 4, "spare_gpus": 1, "min_gpus": 2},
    ],
    ids=["ideal", "reports", "lag", "forecast", "few", "slow-moves", "nodes"],
)
def test_every_log_passes_the_audit(policy: str, changes: dict) -> None:
    result, _, report = run(service(), policy=policy, migration_price=1e-5, **changes)
    if "link_bytes_per_s" in changes:  # a request may end on its way: counted, not logged
        assert result.migrations >= report.migrations > 0.9 * result.migrations
    else:
        assert result.migrations == report.migrations
    assert result.preemptions == report.preemptions
    assert result.ratio > 0.5


def test_gpu_seconds_agree_with_the_log_under_ideal_elasticity() -> None:
    result, _, report = run(service())
    assert result.gpu_seconds == pytest.approx(report.gpu_seconds, rel=1e-9)
    assert result.billed_gpu_seconds == pytest.approx(report.gpu_seconds, rel=1e-9)
    assert result.peak_gpus == report.peak_gpus
    assert result.migrated_tokens == report.migrated_tokens


def test_never_fewer_gpus_than_the_lower_bound_and_hand_checked_sums() -> None:
    rows = [TraceRow(0, 0.0, 600, 32), TraceRow(1, 0.0, 600, 16)]
    result, log, _ = run(rows, gpu_tokens=1000)
    epoch = 16 / 30
    assert result.gpu_seconds == pytest.approx(3 * epoch)
    assert result.lower_bound_gpu_seconds == pytest.approx(3 * epoch)
    assert result.l2_gpu_seconds == pytest.approx(3 * epoch)
    assert result.total_tokens == 1248
    assert [e["event"] for e in log.events[:4]] == ["gpu_open", "place", "gpu_open", "place"]
    ends = {e["request"]: (e["t"], e["tokens"]) for e in log.events if e["event"] == "finish"}
    assert ends == {0: (pytest.approx(2 * epoch), 632), 1: (pytest.approx(epoch), 616)}


def test_start_up_is_billed_and_delays_are_counted() -> None:
    rows = [TraceRow(0, 0.0, 100, 30)]
    result, log, _ = run(rows, startup_s=4.0)
    assert result.delayed_requests == 1
    assert result.delay_p50_s == pytest.approx(4.0)
    assert log.events[0] == {"t": 4.0, "event": "gpu_open", "gpu": "gpu-0", "capacity_tokens": 4000}
    assert result.billed_gpu_seconds >= 4.0 + 1.0
    assert result.gpu_seconds < 2.0
    assert result.demand_short_share > 0.5


def test_whole_nodes_are_billed() -> None:
    alone = run(service(60))[0]
    nodes = run(service(60), gpus_per_node=4)[0]
    assert nodes.gpu_seconds == pytest.approx(alone.gpu_seconds, rel=0.05)
    assert nodes.billed_gpu_seconds > alone.billed_gpu_seconds


def test_same_seed_same_log_other_seed_other_copies() -> None:
    logs = []
    for seed in (1, 1, 2):
        log = Log()
        simulate(service(), SimOptions(gpu_tokens=4000, copies=2.5, seed=seed), sink=log)
        logs.append(log.events)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_cached_prefixes_shorten_prefill() -> None:
    shared = tuple("abcd")
    rows = [TraceRow(i, 3.0 * i, 2048, 200, prefix_hashes=shared) for i in range(5)]
    other = [TraceRow(i, 3.0 * i, 2048, 200, prefix_hashes=(f"{i}",) * 4) for i in range(5)]
    options = {"prefill_tokens_per_s": 500.0, "gpu_tokens": 40_000}
    hit, miss = run(rows, **options)[0], run(other, **options)[0]
    assert hit.lower_bound_gpu_seconds < miss.lower_bound_gpu_seconds


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="epoch_tokens must be at least 1, not 0"):
        SimOptions(gpu_tokens=10, epoch_tokens=0)
    with pytest.raises(ConfigError, match="no policy 'x'"):
        simulate(service(5), SimOptions(gpu_tokens=4000, policy="x"))


def test_requests_larger_than_a_gpu_are_rejected_or_left_out() -> None:
    rows = [TraceRow(0, 0.0, 5000, 5), TraceRow(1, 1.0, 100, 5)]
    kept = simulate(rows, SimOptions(gpu_tokens=4000, drop_larger=False))
    assert (kept.rejected, kept.finished, kept.dropped) == (1, 1, 0)
    left = simulate(rows, SimOptions(gpu_tokens=4000))
    assert (left.rejected, left.finished, left.dropped) == (0, 1, 1)


def test_progress_goes_from_nothing_to_all() -> None:
    seen: list[float] = []
    simulate(service(), OPTIONS, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) < 300


def test_time_series_is_thinned_and_spans_the_run() -> None:
    options = SimOptions(**{**OPTIONS.__dict__, "max_samples": 20})
    line = simulate(service(), options).timeline
    columns = [line.gpus, line.lower_bound, line.used_tokens, line.migrated_tokens, line.queued]
    assert {len(column) for column in columns} == {len(line.t)}
    assert 5 <= len(line.t) <= 20
    assert line.t[-1] > 30
    assert all(g >= b for g, b in zip(line.gpus, line.lower_bound, strict=True))


# --- transformations -------------------------------------------------------------------------


def test_superposed_copies_keep_lengths_and_span() -> None:
    rows = service(100)
    double = superpose(rows, 2.0, Random(1))
    assert len(double) == 200
    assert sorted(r.prompt_tokens for r in double) == sorted(2 * [r.prompt_tokens for r in rows])
    assert [r.request for r in double] == list(range(200))
    times = [r.arrival_s for r in double]
    assert times == sorted(times)
    assert times[-1] <= rows[-1].arrival_s * 1.02
    assert set(times) > {r.arrival_s for r in rows}  # the first copy stays where it is
    half = superpose(rows, 0.5, Random(1))
    assert 30 <= len(half) <= 70
    assert superpose([], 3.0, Random(1)) == []


def test_prepare_keeps_row_numbers_without_copies() -> None:
    rows = [TraceRow(7, 2.0, 50, 5), TraceRow(3, 1.0, 9000, 5), TraceRow(9, 0.5, 10, 5)]
    kept, dropped = prepare(rows, SimOptions(gpu_tokens=100, time_compression=2.0))
    assert [(r.request, r.arrival_s) for r in kept] == [(9, 0.25), (7, 1.0)]
    assert dropped == 1
    assert drop_larger(rows, 55) == [rows[0], rows[2]]
    assert [r.arrival_s for r in compress(rows, 4.0)] == [0.5, 0.25, 0.125]


def test_coarse_clock_is_spread_within_its_step() -> None:
    rows = [TraceRow(i, 3.0 * (i // 4), 10, 5) for i in range(40)]
    spread = spread_ties(rows, Random(1))
    assert len({r.arrival_s for r in spread}) == 40
    by_number = {r.request: r.arrival_s for r in spread}
    assert all(0 <= by_number[r.request] - r.arrival_s < 3.0 for r in rows)


def with_gaps() -> list[TraceRow]:
    """Bursts with minutes of nothing between them, the first one long after time 0."""
    starts = (900.0, 1800.0, 1803.0, 2700.0)
    return [
        TraceRow(4 * burst + i, start + i / 7, 300 + 50 * i, 40 + 30 * i)
        for burst, start in enumerate(starts)
        for i in range(4)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"startup_s": 30.0},
        {"idle_grace_s": 20.0, "measure_from_share": 0.4, "measure_drain": False},
        {"max_samples": 50},
        {"policy": "mell", "gpus_per_node": 4},
    ],
)
def test_quiet_times_are_left_out_without_a_trace(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, short_log, _ = run(with_gaps(), **changes)
    monkeypatch.setattr(Simulation, "_skip_idle", lambda _, step: step)
    long, long_log, _ = run(with_gaps(), **changes)
    assert short_log.events == long_log.events
    assert short.scheduler_events < long.scheduler_events / 2
    assert short.duration_s == pytest.approx(long.duration_s)
    left_out = ("scheduler_events", "scheduler_seconds", "duration_s", "timeline")
    for name in set(short.__dict__) - set(left_out):
        assert getattr(short, name) == getattr(long, name), name
    assert short.timeline.t == pytest.approx(long.timeline.t)
    assert short.timeline.gpus == long.timeline.gpus


def test_years_before_the_first_request_take_no_time() -> None:
    result, _, _ = run([TraceRow(0, 9e7, 10, 30)])
    assert result.scheduler_events < 1000


def test_a_share_of_the_trace_is_measured_wherever_it_begins() -> None:
    rows = service(60)
    later = [replace(row, arrival_s=row.arrival_s + 3600.0) for row in rows]
    first, _, _ = run(rows, measure_from_share=0.5)
    second, _, _ = run(later, measure_from_share=0.5)
    assert second.total_tokens == first.total_tokens
    assert second.lower_bound_gpu_seconds == pytest.approx(first.lower_bound_gpu_seconds, rel=0.05)


def test_copies_of_a_trace_that_begins_late_keep_its_load() -> None:
    rows = [TraceRow(i, 3600.0 + i, 10, 10) for i in range(100)]
    copies = superpose(rows, 3, Random(0))
    assert len(copies) == 300
    assert copies[0].arrival_s >= 3600.0
    assert copies[-1].arrival_s < 3701.0


def test_a_request_that_waits_again_after_a_preemption_is_one_that_waited() -> None:
    result, _, report = run(service(80), max_gpus=1)
    assert report.preemptions > 0
    assert result.delayed_requests <= result.finished


@pytest.mark.parametrize(
    "changes",
    [
        {"startup_s": float("inf")},
        {"decode_tokens_per_s": float("inf")},
        {"time_compression": float("inf")},
        {"idle_grace_s": float("nan")},
        {"max_gpus": 1, "initial_gpus": 5},
        {"max_gpus": 1, "spare_gpus": 2},
    ],
)
def test_options_that_make_no_sense_are_named(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(reversed(changes))):
        SimOptions(gpu_tokens=4000, **changes)
