"""Where recorded values go: to Ray's metrics, by the names of the catalog."""

from __future__ import annotations

from typing import Any, Protocol

from mell_ray.observability.catalog import BY_NAME, METRICS, Source


class Recorder(Protocol):
    """Takes values in. Labels are keywords and must be exactly the catalog's.

    All methods raise KeyError for a metric that the catalog does not have.
    """

    def add(self, name: str, value: float, **labels: str) -> None:
        """Raise a counter; 0 does nothing."""
        ...

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...


class RayRecorder:
    """``ray.util.metrics`` of this process, which must be a Ray worker.

    Every call costs microseconds here and again in the node's agent, so callers add up per engine
    step or per second. Ray rebuilds histograms from bucket counts: their ``_sum`` is approximate.
    """

    def __init__(self, source: Source, **labels: str) -> None:
        """``labels``: given with every value of this process that has them."""
        from ray.util.metrics import Counter, Gauge, Histogram

        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            if metric.source != source:
                continue
            if metric.kind == "histogram":
                made = Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                made = kind(metric.name, metric.help, metric.labels)
            made.set_default_tags({k: v for k, v in labels.items() if k in metric.labels})
            self._metrics[metric.name] = made

    def start_from_zero(self, model: str) -> None:
        """Export the counters that are to be seen before they first count. ``Counter.inc`` refuses
        a 0, so this goes one layer below."""
        for name, made in self._metrics.items():
            metric = BY_NAME[name]
            if not metric.from_zero:
                continue
            if not metric.values:
                made._record(0.0, {"model": model})
            for value in metric.values:
                made._record(0.0, {"model": model, metric.labels[-1]: value})

    def add(self, name: str, value: float, **labels: str) -> None:
        metric = self._metrics[name]
        if value:
            metric.inc(value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].observe(value, labels)
