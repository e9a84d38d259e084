"""Writes what follows from other files: the chart's README and the schema of its values.

    python helm/generate.py

The schema holds mell-ray's own (`mell_ray/config.py`), so run it also after a change there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from schema import values_schema  # noqa: E402  (found through the line above)

CHART = HERE / "mell-ray"
MARK = "<!-- values -->"
INDENT = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """One documented line of values.yaml."""

    path: tuple[str, ...]
    text: str


def documented(source: str) -> Iterator[Setting]:
    """The settings that a ``# --`` comment stands before, in the file's order."""
    path: list[str] = []
    text: list[str] = []
    for line in source.splitlines():
        content = line.strip()
        if content.startswith("# -- "):
            text = [content.removeprefix("# -- ")]
        elif content.startswith("# ") and text:
            text.append(content.removeprefix("# "))
        elif match := re.match(r"( *)([\w./-]+):", line):
            path[len(match[1]) // INDENT :] = [match[2]]
            if text:
                yield Setting(tuple(path), " ".join(text))
            text = []


def values_table() -> str:
    source = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(source)
    settings = list(documented(source))
    parents = {setting.path[:-1] for setting in settings}
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for setting in settings:
        default = ""
        if setting.path not in parents:
            default = f"`{json.dumps(_lookup(values, setting.path))}`"
        text = setting.text.replace("|", r"\|")
        lines.append(f"| `{'.'.join(setting.path)}` | {default} | {text} |")
    return "\n".join(lines)


def _lookup(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def outputs() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    template = (HERE / "README.template.md").read_text()
    return {
        CHART / "README.md": template.replace(MARK, values_table()),
        CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for file, text in outputs().items():
        file.write_text(text)
