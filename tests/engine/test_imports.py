"""The plain parts of the engine can be had without torch: the scheduler's side uses them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["types", "block_pool", "sequence", "planner", "validation"])
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, mell_ray.engine.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_names_what_it_offers() -> None:
    import mell_ray.engine as package

    assert [getattr(package, name).__name__ for name in package.__all__] == package.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
