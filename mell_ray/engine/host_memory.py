"""How much of the host's memory is left."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Memory that this process could take: of the machine, and of the container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        stats = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text()) - int(stats["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, KeyError):
        pass  # no limit of this kind
    return free
