"""What a result must say besides its figures: where and with what they came about."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("mell-ray", "torch", "transformers")
_START_TICKS = 19  # field starttime of proc_pid_stat(5), counted behind the name


def seconds_since_process_start() -> float:
    """Age of this process in seconds.

    On Linux from the kernel's own clock: psutil adds the time of boot, which is in whole seconds.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        import psutil

        return time.time() - psutil.Process().create_time()
    started = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


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
