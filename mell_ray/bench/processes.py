"""CPU seconds of a Ray cluster's processes, by what they are for."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import psutil

# Where a process' name or command line says what it is; the first that is found counts.
_ROLES = {
    "ServeReplica:mell:Ingress": "ingress",
    "ServeReplica:mell:Router": "router",
    "Migrator": "migrator",
    "NullReplica": "replica",
    "ProxyActor": "proxy",
    "HAProxyManager": "proxy",
    "haproxy": "haproxy",
}
SERVING = frozenset(_ROLES.values())
OTHERS = "ray"  # raylet, GCS, agents, Serve's controller, idle workers


def cpu_seconds(scratch: str) -> dict[str, float]:
    """User and system time so far by role, of all processes below this one, and of those that
    have ``scratch`` in their command line."""
    spent: dict[str, float] = collections.defaultdict(float)
    below = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if process.pid not in below and scratch not in command:
                continue
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent[_role(command)] += times.user + times.system
    return dict(spent)


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {role: after[role] - before.get(role, 0.0) for role in sorted(after)}


def _role(command: str) -> str:
    for mark, role in _ROLES.items():
        if mark in command:
            return role
    return OTHERS
