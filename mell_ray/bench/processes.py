"""The processes of a Ray cluster by what they are for: CPU time, memory."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

import psutil

APP = "mell"  # whose ingress and Router are known by name
# Where a process' name or command line says what it is; the first that is found counts.
_ROLES = {
    f"ServeReplica:{APP}:Ingress": "ingress",
    f"ServeReplica:{APP}:Router": "router",
    "Migrator": "migrator",
    "NullReplica": "replica",
    "GPUReplica": "replica",
    "TimedReplica": "replica",
    "ProxyActor": "proxy",
    "HAProxyManager": "proxy",
    "haproxy": "haproxy",
    "ServeController": "controller",
    "raylet": "raylet",
    "gcs_server": "gcs",
}
SERVING = ("ingress", "router", "migrator", "replica", "proxy", "haproxy")
OTHER = "other"  # Ray's agents, idle workers


def processes(scratch: str | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """(role, process) of all below this one, and of those that have ``scratch`` in their command
    line."""
    below = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if process.pid in below or (scratch is not None and scratch in command):
            yield _role(command), process


def cpu_seconds(scratch: str) -> dict[str, float]:
    """User and system time so far by role."""
    spent: dict[str, float] = collections.defaultdict(float)
    for role, process in processes(scratch):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent[role] += times.user + times.system
    return dict(spent)


def private_bytes(scratch: str) -> dict[tuple[str, int], int]:
    """Resident memory that is not shared with others, by (role, process id)."""
    found = {}
    for role, process in processes(scratch):
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        found[role, process.pid] = memory.rss - memory.shared
    return found


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {role: after[role] - before.get(role, 0.0) for role in sorted(after)}


def _role(command: str) -> str:
    for mark, role in _ROLES.items():
        if mark in command:
            return role
    return OTHER
