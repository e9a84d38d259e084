"""The alert rules, by Prometheus's own unit tests: each fires when it should and else does not."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mell_ray.observability import alerts
from mell_ray.observability.alerts import ALERTS, Alert

BY_NAME = {alert.name: alert for alert in ALERTS}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="no promtool here (Debian's package prometheus has it; .ci/tools unpacks it)",
)


@dataclass(frozen=True)
class Case:
    """Series of one sample every 15 s, and when to look. ``summary``: None, it does not fire."""

    alert: str
    series: dict[str, str]
    at: str
    summary: str | None
    labels: tuple[tuple[str, str], ...] = (("model", "m"),)


def ended(outcome: str, values: str) -> dict[str, str]:
    return {f'ray_mell_requests_finished_total{{model="m",outcome="{outcome}"}}': values}


def buckets(name: str, labels: str, **counts: str) -> dict[str, str]:
    """``le_10="0+1x40"`` is the bucket up to 10; dots are written as ``p``."""
    return {
        f'{name}_bucket{{{labels}le="{le[3:].replace("p", ".").replace("inf", "+Inf")}"}}': values
        for le, values in counts.items()
    }


TTFT, STALL = "ray_mell_time_to_first_token_seconds", "ray_mell_migration_stall_seconds"
EPOCH = "ray_mell_scheduler_epoch_seconds"
BOUND = "ray_mell_gpus_lower_bound"
QUEUED = 'ray_mell_requests{model="m",state="queued"}'
STARTING = 'ray_mell_gpus{model="m",state="starting"}'
ACTIVE = 'ray_mell_gpus{model="m",state="active"}'
DIED = 'ray_mell_recoveries_total{model="m",cause="died"}'
EVICTED = 'ray_mell_recoveries_total{model="m",cause="evicted"}'
VIOLATIONS = 'ray_mell_exactly_once_violations_total{model="m"}'
PREEMPTED = 'ray_mell_preemptions_total{model="m"}'


def moved(outcome: str, values: str) -> dict[str, str]:
    labels = f'mode="kv",reason="consolidate",outcome="{outcome}"'
    return {f"ray_mell_migrations_total{{{labels}}}": values}


CASES = (
    Case(
        "MellExactlyOnceViolated",
        {VIOLATIONS: "0x10 1x10"},
        "4m",
        "A replica sent tokens of a request that it did not own",
    ),
    Case("MellExactlyOnceViolated", {VIOLATIONS: "0x40"}, "8m", None),
    Case("MellRouterAbsent", {BOUND: "1x4 _x40"}, "9m", "No Router reports", ()),
    Case("MellRouterAbsent", {BOUND: "0x40"}, "9m", None),
    Case(
        "MellRequestErrors",
        {**ended("error", "0+3x60"), **ended("stop", "0+97x60")},
        "12m",
        "3% of the requests to m fail",
    ),
    Case(
        "MellRequestErrors",
        {**ended("error", "0x60"), **ended("cancelled", "0+50x60"), **ended("stop", "0+50x60")},
        "12m",
        None,
    ),
    Case(
        "MellRequestsRefused",
        {**ended("refused", "0+1x60"), **ended("stop", "0+3x60")},
        "12m",
        "25% of the requests to m are refused",
    ),
    Case(
        "MellRequestsRefused",
        {**ended("refused", "0+1x60"), **ended("stop", "0+99x60")},
        "12m",
        None,
    ),
    Case(
        "MellQueueStuck",
        {QUEUED: "2x60"},
        "6m",
        "Requests to m have been queueing for five minutes",
    ),
    Case("MellQueueStuck", {QUEUED: "2x15 0x2 2x15"}, "6m", None),
    Case(
        "MellGpuNotStarting",
        {STARTING: "1x80"},
        "16m",
        "A GPU for m has been starting for 15 minutes",
    ),
    Case("MellGpuNotStarting", {STARTING: "1x40 0x40"}, "16m", None),
    Case(
        "MellReplicasDying",
        {DIED: "0x10 3x10"},
        "4m",
        "Replicas of m died with requests on them",
    ),
    Case("MellReplicasDying", {DIED: "0x20", EVICTED: "0+1x20"}, "4m", None),
    Case(
        "MellSlowFirstToken",
        buckets(TTFT, 'model="m",', le_10p0="0x80", le_30p0="0+1x80", le_inf="0+1x80"),
        "17m",
        "The first token of m takes 29s (p95)",
    ),
    Case(
        "MellSlowFirstToken",
        buckets(TTFT, 'model="m",', le_10p0="0+99x80", le_30p0="0+100x80", le_inf="0+100x80"),
        "17m",
        None,
    ),
    Case(
        "MellMigrationsFailing",
        {**moved("aborted", "0+3x90"), **moved("committed", "0+1x90")},
        "21m",
        "75% of the migrations fail",
        (),
    ),
    Case(
        "MellMigrationsFailing",
        {**moved("aborted", "0+1x90"), **moved("committed", "0+3x90")},
        "21m",
        None,
    ),
    Case(  # requests that end while they are moved are no failures
        "MellMigrationsFailing",
        {**moved("gone", "0+3x90"), **moved("committed", "0+1x90")},
        "21m",
        None,
    ),
    Case(
        "MellMigrationStalls",
        buckets(STALL, 'mode="kv",', le_1p0="0x80", le_5p0="0+100x80", le_inf="0+100x80"),
        "17m",
        "Migrations stall their requests for 4.96s (p99)",
        (),
    ),
    Case(
        "MellMigrationStalls",
        buckets(STALL, 'mode="kv",', le_1p0="0+100x80", le_5p0="0+100x80", le_inf="0+100x80"),
        "17m",
        None,
    ),
    Case(
        "MellPackingPoor",
        {ACTIVE: "8x150", BOUND: "4x150"},
        "32m",
        "8 GPUs are in use where far fewer would do",
        (),
    ),
    Case("MellPackingPoor", {ACTIVE: "7x150", BOUND: "4x150"}, "32m", None),
    Case("MellPackingPoor", {ACTIVE: "1x150", BOUND: "0x150"}, "32m", None),
    Case(
        "MellPreempting",
        {PREEMPTED: "0+15x100"},
        "21m",
        "Requests to m are preempted 1 times a second",
    ),
    Case("MellPreempting", {PREEMPTED: "0+1x100"}, "21m", None),
    Case(
        "MellSchedulerSlow",
        buckets(EPOCH, "", le_0p2="0x80", le_0p4="0+100x80", le_inf="0+100x80"),
        "17m",
        "A planning epoch takes 398ms (p99)",
        (),
    ),
    Case(
        "MellSchedulerSlow",
        buckets(EPOCH, "", le_0p2="0+100x80", le_0p4="0+100x80", le_inf="0+100x80"),
        "17m",
        None,
    ),
)


def test_committed_rules_are_the_generated_ones() -> None:
    assert alerts.PATH.read_text() == alerts.text()


def test_every_alert_is_tested_firing_and_quiet() -> None:
    firing = {case.alert for case in CASES if case.summary is not None}
    quiet = {case.alert for case in CASES if case.summary is None}
    assert firing == quiet == set(BY_NAME)


@needs_promtool
def test_rules_are_valid(tmp_path: Path) -> None:
    promtool("check", "rules", str(alerts.PATH), cwd=tmp_path)


@needs_promtool
def test_rules_fire_when_they_should_and_else_do_not(tmp_path: Path) -> None:
    suite = {
        "rule_files": [str(alerts.PATH)],
        "evaluation_interval": "15s",
        "tests": [rule_test(case) for case in CASES],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    promtool("test", "rules", "suite.yaml", cwd=tmp_path)


def rule_test(case: Case) -> dict[str, Any]:
    alert = BY_NAME[case.alert]
    expected = [] if case.summary is None else [fired(alert, case)]
    return {
        "name": case.alert,
        "interval": "15s",
        "input_series": [{"series": name, "values": v} for name, v in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}
        ],
    }


def fired(alert: Alert, case: Case) -> dict[str, Any]:
    return {
        "exp_labels": {"severity": alert.severity, **dict(case.labels)},
        "exp_annotations": {"summary": case.summary, "description": alert.description},
    }


def promtool(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
