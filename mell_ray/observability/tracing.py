"""OpenTelemetry spans, and the one place that knows the SDK.

A request's trace begins at its ingress, or goes on from the ``traceparent`` that its client sent.
Its context travels as a ``traceparent`` string: with the request to replicas, also through
migrations, and to the Router. Where the string is empty nothing is traced and nothing costs
anything. Spans are written down when what they tell of has ended, with the times it had.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mell_ray.config import TracingConfig
from mell_ray.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

EXPORT_DELAY_MS = 500
TRACEPARENT = "traceparent"

Attributes = Mapping[str, str | int | float | bool]


class Tracer:
    """Makes spans for one process. ``service`` says which: ingress, router, replica."""

    def __init__(self, config: TracingConfig, service: str) -> None:
        """``config.exporter`` must not be "none"."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        # A provider of our own: the global one belongs to whoever runs in this process besides.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"mell-ray-{service}"}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        )
        exporter = _exporter(config, service)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_DELAY_MS)
        )
        self._tracer = self._provider.get_tracer("mell_ray")

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:
        """A span that begins now; without ``parent`` it begins a trace. ``end`` it."""
        return self._tracer.start_span(name, _context(parent), attributes=dict(attributes))

    def record(
        self,
        name: str,
        parent: str,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        events: Sequence[tuple[str, float, Attributes]] = (),
    ) -> str:
        """A span that has ended, from ``start_s`` to ``end_s`` (``time.time``). Returns its own
        traceparent, for spans below it."""
        span = self._tracer.start_span(
            name, _context(parent), attributes=dict(attributes or {}), start_time=_ns(start_s)
        )
        for title, at, details in events:
            span.add_event(title, dict(details), _ns(at))
        span.end(_ns(max(start_s, end_s)))
        return traceparent(span)

    def flush(self) -> None:
        """Hand out what is waiting."""
        self._provider.force_flush()


def check_tracing(config: TracingConfig) -> None:
    """Raises ConfigError where the exporter is not installed."""
    if config.exporter == "otlp":
        try:
            import opentelemetry.exporter.otlp.proto.http  # noqa: F401
        except ImportError:
            raise ConfigError(
                "mell.observability.tracing.exporter: 'otlp' needs its exporter: "
                "pip install 'mell-ray[tracing]'"
            ) from None


def make_tracer(config: TracingConfig, service: str) -> Tracer | None:
    """None where tracing is off."""
    return None if config.exporter == "none" else Tracer(config, service)


def traceparent(span: Span) -> str:
    """The W3C header of a span; "" if it is not sampled, so that nobody traces on."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not span.get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier[TRACEPARENT]


def _context(parent: str) -> Any:
    """A header that is not W3C's is no parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {TRACEPARENT: parent} if parent else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _exporter(config: TracingConfig, service: str) -> SpanExporter:
    if config.exporter == "file":
        return _file_exporter(Path(config.directory) / f"{service}-{os.getpid()}.jsonl")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    if config.endpoint is None:
        return OTLPSpanExporter()
    return OTLPSpanExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/traces")


def _file_exporter(path: Path) -> SpanExporter:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class FileExporter(SpanExporter):
        """One JSON object a line."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            lines = [span.to_json(indent=None) + "\n" for span in spans]
            with path.open("a") as file:
                file.write("".join(lines))
            return SpanExportResult.SUCCESS

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileExporter()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
