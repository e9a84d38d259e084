"""Metrics: the table and the code agree, and each meter records what happened, once."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import mell_ray
from mell_ray.engine.types import EngineStats
from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.observability.catalog import BY_NAME, METRICS
from mell_ray.observability.clock import RequestClock
from mell_ray.observability.fleet import FleetMeter, GpuSample
from mell_ray.observability.pulse import MAX_SAMPLES, Pulse
from mell_ray.observability.reference import PATH, render
from mell_ray.observability.replica import ReplicaMeter
from mell_ray.observability.requests import MAX_GAPS_PER_FLUSH, RequestMeter
from tests.observability.memory import MemoryRecorder

PACKAGE = Path(mell_ray.__file__).parent


class Time:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_reference_table_is_generated_from_the_catalog() -> None:
    assert PATH.read_text() == render()


def test_every_metric_is_recorded_somewhere_and_every_recorded_one_is_in_the_table() -> None:
    call = re.compile(r'\.(?:add|set|observe)\(\s*"(mell_\w+)"')
    of_engine = re.compile(r'^    "(mell_\w+_total)": "', re.MULTILINE)  # in replica.py
    recorded: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        recorded.update(call.findall(text), of_engine.findall(text))
    assert recorded == set(BY_NAME)


def test_names_follow_prometheus_conventions() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")
        if metric.from_zero:  # for all values that its labels can have
            assert metric.labels[0] == "model"
            assert len(metric.labels) == 1 + bool(metric.values)


def request_meter() -> tuple[RequestMeter, MemoryRecorder, Time, list[Pulse]]:
    recorder, now, pulses = MemoryRecorder(), Time(), []
    return RequestMeter(recorder, ["m"], pulses.append, now), recorder, now, pulses


def test_one_request_gives_queue_ttft_tpot_and_tokens() -> None:
    meter, recorder, now, pulses = request_meter()
    clock = RequestClock(accepted=now())
    now.now += 0.5
    meter.placed("m", clock)
    meter.placed("m", clock)  # a retry is no second end of queueing
    now.now += 1.0
    meter.delivered("m", clock, now(), "gpu-a", 1, 1, 7)
    for _ in range(4):
        now.now += 0.25
        meter.delivered("m", clock, now(), "gpu-a", 1, 1, 7)
    meter.finished("m", clock, "length")
    meter.flush()
    assert recorder.values("mell_queue_time_seconds", model="m") == [0.5]
    assert recorder.values("mell_time_to_first_token_seconds", model="m") == [1.5]
    assert recorder.values("mell_time_per_output_token_seconds", model="m") == [0.25]
    assert recorder.values("mell_inter_token_latency_seconds", model="m") == [0.25] * 4
    assert recorder.counter("mell_prompt_tokens_total", model="m") == 7
    assert recorder.counter("mell_generation_tokens_total", model="m") == 5
    assert recorder.counter("mell_requests_finished_total", model="m", outcome="length") == 1
    assert pulses == [Pulse(5, (1.5,), (0.25,), ())]


def test_nothing_is_recorded_for_a_token_by_itself() -> None:
    """Many tokens cost a bounded number of calls a second, and every token is counted."""
    meter, recorder, now, pulses = request_meter()
    clock = RequestClock(accepted=now())
    meter.placed("m", clock)
    meter.delivered("m", clock, now(), "gpu-a", 1, 1, 1)
    for _ in range(5000):
        now.now += 0.01
        meter.delivered("m", clock, now(), "gpu-a", 1, 1, 1)
    assert not recorder.values("mell_inter_token_latency_seconds", model="m")
    meter.flush()
    gaps = recorder.values("mell_inter_token_latency_seconds", model="m")
    assert len(gaps) == MAX_GAPS_PER_FLUSH
    assert recorder.counter("mell_generation_tokens_total", model="m") == 5001
    meter.flush()
    assert len(pulses) == 1, "an idle ingress has nothing to tell"


def test_pulse_is_bounded() -> None:
    meter, _, now, pulses = request_meter()
    for _ in range(10 * MAX_SAMPLES):
        clock = RequestClock(accepted=now())
        meter.placed("m", clock)
        meter.delivered("m", clock, now(), "gpu-a", 1, 1, 1)
    meter.flush()
    assert len(pulses[0].ttft_s) == MAX_SAMPLES
    assert pulses[0].tokens == 10 * MAX_SAMPLES


def test_change_of_owner_is_a_stall_and_a_loss_makes_it_a_recovery() -> None:
    meter, recorder, now, pulses = request_meter()
    clock = RequestClock(accepted=now())
    meter.placed("m", clock)
    steps = [("a", 1, 0.1), ("a", 1, 0.1), ("b", 2, 0.4), ("b", 2, 0.1)]
    for replica, generation, gap in steps:
        now.now += gap
        meter.delivered("m", clock, now(), replica, generation, 1, 3)
    meter.lost("m", clock, died=True)
    now.now += 2.0
    meter.delivered("m", clock, now(), "c", 3, 1, 3)
    meter.flush()
    assert (clock.migrations, clock.recoveries) == (1, 1)
    assert [stall.kind for stall in clock.stalls] == ["migration", "recovery"]
    assert pulses[0].stall_s == pytest.approx((0.4, 2.0))
    assert recorder.counter("mell_recoveries_total", model="m", cause="died") == 1
    shown = clock.breakdown()
    assert [stay["id"] for stay in shown["replicas"]] == ["a", "b", "c"]
    assert [stay["tokens"] for stay in shown["replicas"]] == [2, 2, 1]
    assert shown["tokens"] == 5
    assert shown["queue_ms"] + shown["prefill_ms"] + shown["decode_ms"] == pytest.approx(
        shown["total_ms"]
    )


def test_clock_of_a_request_that_moves_for_ever_stays_small() -> None:
    clock = RequestClock(accepted=0.0)
    clock.placed(0.0)
    for i in range(1000):
        clock.tokens(float(i), f"gpu-{i % 7}", i + 1, 1)
    assert len(clock.stays) < 100
    assert len(clock.stalls) < 100
    assert clock.migrations == 999


def stats(**changes: int) -> EngineStats:
    base = {"capacity_blocks": 100, "used_blocks": 30, "cached_blocks": 20, "running": 2}
    rest = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
    return EngineStats(**{**rest, **base, **changes})


def test_replica_meter_records_increases_and_blocks() -> None:
    recorder, now = MemoryRecorder(), Time()
    meter = ReplicaMeter(recorder, "m", "gpu-a", now() - 5.0, now)
    meter.sample(stats(prefix_query_tokens=64, prefix_hit_tokens=16, preemptions=1))
    now.now += 0.5
    meter.sample(stats(prefix_query_tokens=100, prefix_hit_tokens=32, preemptions=1))
    assert recorder.counter("mell_gpu_seconds_total", model="m") == pytest.approx(5.5)
    assert recorder.counter("mell_prefix_cache_query_tokens_total", model="m") == 100
    assert recorder.counter("mell_prefix_cache_hit_tokens_total", model="m") == 32
    assert recorder.counter("mell_preemptions_total", model="m") == 1
    blocks = {
        state: recorder.gauge("mell_kv_blocks", model="m", replica="gpu-a", state=state)
        for state in ("used", "cached", "free")
    }
    assert blocks == {"used": 30, "cached": 20, "free": 50}


def test_fleet_meter_counts_states_and_clears_what_is_gone() -> None:
    recorder = MemoryRecorder()
    meter = FleetMeter(recorder, ["m"])
    meter.epoch(0.001)
    gpus = [GpuSample("m", "active", 3, 1), GpuSample("m", "idle"), GpuSample("m", "starting")]
    gpus += [GpuSample("m", "asleep"), GpuSample("m", "lent")]
    meter.sample(gpus, 1, {"m": 2}, {"m": 1})
    assert recorder.gauge("mell_gpus", model="m", state="active") == 1
    for state in ("starting", "asleep", "lent"):
        assert recorder.gauge("mell_gpus", model="m", state=state) == 1
    assert recorder.gauge("mell_gpus_lower_bound") == 1
    requests = {
        state: recorder.gauge("mell_requests", model="m", state=state)
        for state in ("queued", "waiting", "running", "migrating")
    }
    assert requests == {"queued": 2, "waiting": 1, "running": 2, "migrating": 1}
    meter.sample([], 0, {}, {})
    assert recorder.gauge("mell_gpus", model="m", state="active") == 0
    assert recorder.gauge("mell_requests", model="m", state="queued") == 0


def test_migrations_are_counted_by_outcome_and_timed_if_committed() -> None:
    recorder = MemoryRecorder()
    meter = FleetMeter(recorder, ["m"])
    order = MigrationOrder("id", "r", "a", "b", "kv", "consolidate")
    done = MigrationResult(
        order, "committed", stages=3, bytes=4096, seconds=0.25, freeze_s=0.0625, copy_s=0.125
    )
    meter.migrated(done)
    meter.migrated(MigrationResult(order, "aborted", "no room", 1, 100))
    labels = {"mode": "kv", "reason": "consolidate"}
    assert recorder.counter("mell_migrations_total", outcome="committed", **labels) == 1
    assert recorder.counter("mell_migrations_total", outcome="aborted", **labels) == 1
    assert recorder.counter("mell_migration_bytes_total", mode="kv") == 4196
    assert recorder.values("mell_migration_stall_seconds", mode="kv") == [0.0625]
    for phase, seconds in (("reserve", 0.0625), ("copy", 0.125), ("hand-over", 0.0625)):
        told = recorder.values("mell_migration_phase_seconds", mode="kv", phase=phase)
        assert told == [seconds]
    assert recorder.values("mell_migration_stages", mode="kv") == [3]
    assert recorder.values("mell_migration_size_bytes", mode="kv") == [4096]
