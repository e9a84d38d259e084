"""What a result must say besides its figures: where and with what they came about."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("mell-ray", "torch", "transformers")


def seconds_since_process_start() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()


def machine() -> dict[str, object]:
    import torch

    features = torch.cpu.get_capabilities()
    return {
        "cpu": str(features.get("cpu_name") or platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "isa": [name for name in ("avx2", "avx512_bf16", "amx_bf16") if features.get(name)],
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree"
    return found
