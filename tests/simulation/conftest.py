"""Where the recorded traces are, and small traces written to disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def recorded_traces() -> Path:
    """The directory of recorded traces; a test that needs it is skipped where there is none."""
    given = os.environ.get("MELL_TRACES")
    path = Path(given) if given else REPO.parent / "shared" / "traces"
    if not path.is_dir():
        pytest.skip(f"no recorded traces at {path}; set MELL_TRACES to their directory")
    return path
