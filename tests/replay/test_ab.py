"""The parts of ``load_tests/ab_gpu_hours.py`` that need no server."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from mell_ray.config import MellConfig
from mell_ray.replay.types import Job

SCRIPT = Path(__file__).resolve().parents[2] / "load_tests" / "ab_gpu_hours.py"


@pytest.fixture(scope="module")
def ab() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ab_gpu_hours", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ab_gpu_hours"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_replicas_count_until_the_next_sample_and_the_end(ab: ModuleType) -> None:
    samples = [ab.Sample(10.0, 1), ab.Sample(11.0, 3), ab.Sample(13.5, 2)]
    assert ab.replica_seconds(samples, 14.0) == pytest.approx(1 + 3 * 2.5 + 2 * 0.5)


def arguments(**changes: Any) -> Namespace:
    """What the command line would give."""
    given: dict[str, Any] = {
        "min_replicas": 1,
        "max_replicas": 4,
        "max_num_seqs": 8,
        "pool_mib": 4,
        "time_compression": 10.0,
        "idle_grace_s": 7.0,
        "target_ongoing": 5.0,
        "downscale_delay_s": 600.0,
        "seed": 0,
    }
    return Namespace(**given | changes)


def test_the_sides_differ_in_who_places_and_scales_only(ab: ModuleType) -> None:
    sides = {
        side: ab.config(side, arguments(), 8000)["applications"][0]["args"] for side in ab.SIDES
    }
    assert sides["ours"]["llm_configs"] == sides["baseline"]["llm_configs"]
    ours = MellConfig.parse(sides["ours"])
    default = MellConfig.parse({**sides["ours"], "mell": {}})
    assert ours.mell.policy == default.mell.policy
    assert ours.mell.migration == default.mell.migration
    assert ours.mell.fleet.idle_grace_s == 7.0

    serve = AutoscalingConfig(**sides["baseline"]["autoscaling"])
    own = AutoscalingConfig()
    scaling = ours.llm_configs[0].deployment_config.autoscaling_config
    assert (serve.min_replicas, serve.max_replicas) == (scaling.min_replicas, scaling.max_replicas)
    assert serve.upscale_delay_s == own.upscale_delay_s / 10
    assert serve.downscale_delay_s == own.downscale_delay_s / 10
    assert serve.look_back_period_s == own.look_back_period_s / 10
    assert serve.target_ongoing_requests == 5.0


def test_serve_aims_at_what_a_replica_nearly_always_holds(ab: ModuleType) -> None:
    """Where requests differ little the pool decides, where they differ much their spread does."""
    same = [Job(i, 0.0, 100, 1) for i in range(100)]
    fits = ab.MIB / ab.TOKEN_BYTES / (100.5 + ab.BLOCK_SIZE / 2)
    target = ab.target_ongoing(same, arguments(pool_mib=1, max_num_seqs=100))
    assert target == pytest.approx(0.8 * fits, rel=0.03)
    mixed = [Job(i, 0.0, 1 + 199 * (i % 2), 1) for i in range(100)]
    assert ab.target_ongoing(mixed, arguments(pool_mib=1, max_num_seqs=100)) < 0.7 * target
    assert ab.target_ongoing(same, arguments(pool_mib=1 << 10, max_num_seqs=10)) == 8.0


def test_start_up_is_timed_from_the_first_sight_to_the_first_work(ab: ModuleType) -> None:
    meter = ab.Meter()
    ready = {"id": "a", "state": "ready", "capacity_blocks": 40}
    meter._look([ready], 0.0)
    meter._look([ready, {"id": "b", "state": "starting", "capacity_blocks": 0}], 1.0)
    meter._look([ready, {"id": "b", "state": "starting", "capacity_blocks": 0}], 2.0)
    meter._look([ready, {"id": "b", "state": "ready", "capacity_blocks": 40}], 4.0)
    meter._look([ready, {"id": "b", "state": "ready", "capacity_blocks": 40}], 5.0)
    assert meter.startup_s() == 3.0
    assert meter.capacity_tokens == 40 * ab.BLOCK_SIZE
    assert ab.replica_seconds(meter.samples, 6.0) == 1 + 5 * 2


def test_the_simulator_runs_what_was_measured(ab: ModuleType) -> None:
    """One request at a time, each for two seconds, with one replica that is always there."""
    jobs = [Job(i, 4.0 * i, 20, 100) for i in range(5)]
    ours = {
        "tpot_ms": {"mean": 20.0},
        "capacity_tokens": 1000,
        "startup_s": None,
        "replica_seconds": 20.0,
    }
    told = ab.simulated(jobs, ours, arguments())
    assert told["replica_seconds"] == pytest.approx(18.0, abs=0.7)
    assert told["difference"] == pytest.approx(told["replica_seconds"] / 20 - 1)
    assert ab.simulated(jobs, ours | {"tpot_ms": {"mean": None}}, arguments()) == {}


def test_savings_and_ratios(ab: ModuleType) -> None:
    def side(seconds: float, p99: float | None, failed: int) -> dict[str, object]:
        times = {"p99": p99}
        return {"replica_seconds": seconds, "ttft_ms": times, "tpot_ms": times, "failed": failed}

    told = ab.compare(side(60.0, 110.0, 1), side(80.0, 100.0, 2))
    assert told["saving"] == pytest.approx(0.25)
    assert told["p99_ttft_ratio"] == told["p99_tpot_ratio"] == pytest.approx(1.1)
    assert told["failed"] == 3
    assert ab.compare(side(60.0, None, 0), side(80.0, 100.0, 0))["p99_ttft_ratio"] is None
