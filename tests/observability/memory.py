"""A recorder that keeps what it is given and holds callers to the catalog."""

from __future__ import annotations

from collections import defaultdict

from mell_ray.observability.catalog import BY_NAME

Key = tuple[str, tuple[tuple[str, str], ...]]


class MemoryRecorder:
    def __init__(self) -> None:
        self.counters: dict[Key, float] = defaultdict(float)
        self.gauges: dict[Key, float] = {}
        self.observed: dict[Key, list[float]] = defaultdict(list)
        self.names: set[str] = set()

    def add(self, name: str, value: float, **labels: str) -> None:
        assert value >= 0
        self.counters[self._key(name, "counter", labels)] += value

    def set(self, name: str, value: float, **labels: str) -> None:
        self.gauges[self._key(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed[self._key(name, "histogram", labels)].append(value)

    def _key(self, name: str, kind: str, labels: dict[str, str]) -> Key:
        metric = BY_NAME[name]
        assert metric.kind == kind
        assert set(metric.labels) == set(labels)
        assert all(isinstance(value, str) for value in labels.values())
        self.names.add(name)
        return name, tuple(sorted(labels.items()))

    def counter(self, name: str, **labels: str) -> float:
        return self.counters[name, tuple(sorted(labels.items()))]

    def gauge(self, name: str, **labels: str) -> float:
        return self.gauges[name, tuple(sorted(labels.items()))]

    def values(self, name: str, **labels: str) -> list[float]:
        return self.observed[name, tuple(sorted(labels.items()))]
