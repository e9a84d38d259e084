from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mell_ray.serving import loading


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _take(folder: str, patience_s: float, answers: Any) -> None:
    tempfile.tempdir = folder
    loading.CORES_PER_LOAD = 1 << 20
    with loading.loading_turn(patience_s) as mine:
        answers.put(mine)


def _other(folder: Path, patience_s: float) -> bool:
    """Whether another process gets a turn."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_take, args=(str(folder), patience_s, answers))
    process.start()
    mine = answers.get(timeout=120)
    process.join()
    return bool(mine)


def test_engines_load_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CORES_PER_LOAD", 1 << 20)
    with loading.loading_turn() as mine:
        assert mine
        assert not _other(tmp_path, 0.1)
    assert _other(tmp_path, 120.0)


def test_a_machine_with_more_cores_loads_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: set(range(8)))
    with loading.loading_turn() as first, loading.loading_turn() as second:
        assert first
        assert second
        with loading.loading_turn(0.1) as third:
            assert not third


def test_where_no_lock_can_be_had_it_loads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with loading.loading_turn() as mine:
        assert not mine
