"""The parts of ``load_tests/ab_gpu_hours.py`` that need no server."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from mell_ray.config import MellConfig

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


def test_both_sides_are_valid_and_differ_in_policy_and_migration_only(ab: ModuleType) -> None:
    args = Namespace(min_replicas=1, max_replicas=4, max_num_seqs=8, pool_mib=4, idle_grace_s=2.0)
    sides = {}
    for side in ab.SIDES:
        settings = ab.config(side, args, 8000)["applications"][0]["args"]
        sides[side] = MellConfig.parse(settings).model_dump()
    default = MellConfig.parse({**settings, "mell": {}}).mell.policy.name
    assert sides["ours"]["mell"].pop("policy")["name"] == default
    assert sides["baseline"]["mell"].pop("policy")["name"] == "worst-fit"
    assert sides["ours"]["mell"]["migration"].pop("enabled") is True
    assert sides["baseline"]["mell"]["migration"].pop("enabled") is False
    assert sides["ours"] == sides["baseline"]


def test_savings_and_ratios(ab: ModuleType) -> None:
    def side(seconds: float, p99: float | None, failed: int) -> dict[str, object]:
        times = {"p99": p99}
        return {"replica_seconds": seconds, "ttft_ms": times, "tpot_ms": times, "failed": failed}

    told = ab.compare(side(60.0, 110.0, 1), side(80.0, 100.0, 2))
    assert told["saving"] == pytest.approx(0.25)
    assert told["p99_ttft_ratio"] == told["p99_tpot_ratio"] == pytest.approx(1.1)
    assert told["failed"] == 3
    assert ab.compare(side(60.0, None, 0), side(80.0, 100.0, 0))["p99_ttft_ratio"] is None
