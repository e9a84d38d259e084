"""The dependency directions of the design: pure parts stay pure, nothing points back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mell_ray"

ALLOWED = {
    "scheduler": {"scheduler", "config", "errors"},
    "simulation": {"simulation", "scheduler", "config", "errors"},
    "engine": {"engine", "builtin", "config", "errors"},
    "bench": {"bench", "engine", "migration", "scheduler", "serving", "config", "errors"},
    "migration": {"migration", "engine", "config", "errors"},
    "openai": {"openai", "engine", "errors"},
    "observability": {"observability", "migration", "engine", "config", "errors"},
    "replay": {"replay", "simulation", "errors"},
    "builtin": {"builtin"},
}
PURE = {
    "scheduler": {"ray", "torch", "transformers", "numpy"},
    "simulation": {"ray", "torch"},
    "replay": {"ray", "torch"},
    "engine": {"ray"},
    "openai": {"ray", "torch", "fastapi"},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_depend_only_on_what_the_design_allows(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        used = {n.split(".")[1] for n in imports(path) if n.startswith("mell_ray.")}
        assert used <= ALLOWED[part], f"{path.relative_to(ROOT)} uses {used - ALLOWED[part]}"


@pytest.mark.parametrize("part", sorted(PURE))
def test_pure_parts_know_nothing_of_the_outside(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & PURE[part], f"{path.relative_to(ROOT)} imports {roots & PURE[part]}"


def test_kernels_stand_alone() -> None:
    for path in (ROOT / "kernels" / "mell_kernels").rglob("*.py"):
        assert not any(name.split(".")[0] in ("mell_ray", "ray") for name in imports(path)), path


def test_command_line_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, mell_ray.cli; "
        "heavy = {'ray', 'torch', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
