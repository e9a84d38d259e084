"""What users can read of migrations."""

from __future__ import annotations

from mell_ray.migration.records import REMEMBERED, MigrationLog
from mell_ray.migration.types import MigrationOrder, MigrationResult


def result(request: str, mode: str = "kv", outcome: str = "committed", **fields) -> MigrationResult:
    return MigrationResult(MigrationOrder("m", request, "a", "b", mode, "test"), outcome, **fields)


def test_totals_by_mode() -> None:
    log = MigrationLog()
    log.add(result("r1", bytes=100, tokens=50, cached_tokens=16, stages=2, generation=2))
    log.add(result("r2", outcome="aborted", bytes=20))
    log.add(result("r3", mode="token", tokens=30))
    totals = log.totals_dict()
    assert totals["kv"]["committed"] == 1
    assert totals["kv"]["aborted"] == 1
    assert totals["kv"]["bytes"] == 120
    assert totals["kv"]["tokens"] == 34
    assert totals["token"] == totals["token"] | {"committed": 1, "tokens": 30, "bytes": 0}


def test_stall_reaches_the_migration_it_belongs_to() -> None:
    log = MigrationLog()
    log.add(result("r", generation=2))
    log.add(result("other", generation=3))
    log.add(result("r", generation=3))
    assert log.stalled("r", 3, 0.05, 0.02) is not None
    first, other, last = log.recent()
    assert last["stall_seconds"] == 0.05
    assert last["stall_gaps"] == 2.5
    assert first["stall_seconds"] is None
    assert other["stall_seconds"] is None
    assert log.stalled("r", 9, 1.0, 1.0) is None
    assert log.totals_dict()["kv"]["stalls"] == 1


def test_stall_that_is_told_before_the_migration_ends_is_kept() -> None:
    log = MigrationLog()
    assert log.stalled("r", 2, 0.05, 0.02) is None
    log.add(result("r", generation=2))
    (record,) = log.recent()
    assert record["stall_seconds"] == 0.05
    assert log.totals_dict()["kv"]["stalls"] == 1


def test_memory_is_bounded() -> None:
    log = MigrationLog()
    for i in range(REMEMBERED + 10):
        log.add(result(f"r{i}"))
    assert len(log.recent()) == REMEMBERED
    assert log.totals_dict()["kv"]["committed"] == REMEMBERED + 10
