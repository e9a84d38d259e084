"""The table of settings says what the settings are."""

from __future__ import annotations

from pathlib import Path

from mell_ray.config import MellConfig
from mell_ray.settings_doc import settings_table

TABLE = Path(__file__).parents[2] / "deployments" / "SETTINGS.md"


def test_the_committed_table_is_the_present_one() -> None:
    assert TABLE.read_text() == settings_table(), (
        "python -m mell_ray.settings_doc > deployments/SETTINGS.md"
    )


def test_every_setting_is_explained() -> None:
    rows = [line for line in settings_table().splitlines() if line.startswith("| `")]
    unexplained = [row for row in rows if row.endswith("|  |")]
    assert not unexplained
    assert len(rows) > len(MellConfig.model_fields)
