"""Spans: what a trace consists of, who is traced, and where spans go."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mell_ray.config import MellConfig, TracingConfig
from mell_ray.engine.types import RequestState, SamplingParams, StepOutput, TokenDelta
from mell_ray.errors import ConfigError
from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.observability.clock import RequestClock
from mell_ray.observability.spans import (
    MAX_STEP_SPANS,
    ChoiceSpan,
    EngineSpans,
    record_migration,
)
from mell_ray.observability.tracing import Tracer, check_tracing, make_tracer, traceparent

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def tracer(tmp_path: Path) -> Tracer:
    return Tracer(TracingConfig(exporter="file", directory=str(tmp_path)), "test")


def written(tmp_path: Path, tracer: Tracer) -> list[dict[str, Any]]:
    tracer.flush()
    lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def by_name(spans: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {span["name"]: span for span in spans}


def step(request_id: str, finish: Any = None) -> StepOutput:
    delta = TokenDelta(request_id, 1, 0, [5], finish_reason=finish)
    return StepOutput([delta], 1, 0, 10, 0, 0.002)


def test_choice_becomes_queue_prefill_and_decode(tmp_path: Path, tracer: Tracer) -> None:
    span = ChoiceSpan(tracer, CLIENT, "r1", "m", 7)
    clock = RequestClock(accepted=50.0, accepted_wall=1000.0)
    clock.placed(50.5)
    clock.tokens(51.5, "a", 1, 1)
    clock.tokens(53.5, "b", 2, 1)
    span.end(clock, "length")
    spans = by_name(written(tmp_path, tracer))
    assert set(spans) == {"generate", "queue", "prefill", "decode"}
    generate = spans["generate"]
    assert generate["context"]["trace_id"] == f"0x{TRACE_ID}"
    assert generate["attributes"]["mell.outcome"] == "length"
    assert generate["attributes"]["mell.migrations"] == 1
    (stall,) = generate["events"]
    assert stall["attributes"] == {"mell.stall.kind": "migration", "mell.stall.seconds": 2.0}
    for name in ("queue", "prefill", "decode"):
        assert spans[name]["parent_id"] == generate["context"]["span_id"]
    assert spans["prefill"]["start_time"].startswith("1970-01-01T00:16:40.5")
    assert spans["prefill"]["end_time"].startswith("1970-01-01T00:16:41.5")


def test_engine_stay_holds_its_first_steps(tmp_path: Path, tracer: Tracer) -> None:
    spans = EngineSpans(tracer, "gpu-a")
    spans.arrived(RequestState("r1", [1], SamplingParams(8), traceparent=CLIENT))
    spans.arrived(RequestState("r2", [1], SamplingParams(8)))  # not traced
    steps = 3 * MAX_STEP_SPANS
    for _ in range(steps - 1):
        spans.stepped(step("r1"))
        spans.stepped(step("r2"))
    spans.stepped(step("r1", "length"))
    spans.left("r1", "again")  # has left already
    found = written(tmp_path, tracer)
    (stay,) = [span for span in found if span["name"] == "engine"]
    assert stay["attributes"]["mell.left"] == "length"
    assert stay["attributes"]["mell.steps"] == steps
    assert stay["attributes"]["mell.step_seconds"] == pytest.approx(0.002 * steps)
    below = [span for span in found if span["name"] == "engine.step"]
    assert len(below) == MAX_STEP_SPANS
    assert {span["parent_id"] for span in below} == {stay["context"]["span_id"]}


def test_migration_shows_its_freeze(tmp_path: Path, tracer: Tracer) -> None:
    order = MigrationOrder("id", "r1", "a", "b", "kv", "consolidate")
    result = MigrationResult(
        order, "committed", stages=2, bytes=64, seconds=0.5, freeze_s=0.1, finished_at=1000.0
    )
    record_migration(tracer, CLIENT, result)
    record_migration(tracer, "", result)  # not traced
    spans = written(tmp_path, tracer)
    assert len(spans) == 2
    named = by_name(spans)
    assert named["migration"]["attributes"]["mell.migration.to"] == "b"
    assert named["migration"]["start_time"].startswith("1970-01-01T00:16:39.5")
    assert named["freeze"]["parent_id"] == named["migration"]["context"]["span_id"]
    assert named["freeze"]["start_time"].startswith("1970-01-01T00:16:39.9")


@pytest.mark.parametrize("header", ["", "nonsense", "00-zz-yy-01", "00-" + "0" * 32 + "-1-01"])
def test_header_that_names_no_trace_begins_one(tracer: Tracer, header: str) -> None:
    span = tracer.start("chat", header, {})
    assert traceparent(span).split("-")[1] not in ("", "0" * 32, TRACE_ID)
    span.end()


def test_sampling_is_the_clients_choice_and_else_a_share(tmp_path: Path) -> None:
    rare = Tracer(TracingConfig(exporter="file", directory=str(tmp_path), sample_ratio=0.0), "rare")
    assert traceparent(rare.start("chat", "", {})) == ""
    assert traceparent(rare.start("chat", CLIENT, {})).split("-")[1] == TRACE_ID
    often = Tracer(TracingConfig(exporter="file", directory=str(tmp_path)), "often")
    assert traceparent(often.start("chat", CLIENT[:-1] + "0", {})) == ""


def test_nothing_is_made_where_tracing_is_off() -> None:
    assert make_tracer(TracingConfig(), "ingress") is None
    span = ChoiceSpan(None, "", "r1", "m", 7)
    assert span.traceparent == ""
    span.end(RequestClock(), "stop")
    spans = EngineSpans(None, "gpu-a")
    spans.arrived(RequestState("r1", [1], SamplingParams(8), traceparent=CLIENT))
    spans.stepped(step("r1"))


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A loopback OTLP collector: its URL and the requests it got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", received
    server.shutdown()
    server.server_close()


def test_otlp_collector_gets_the_spans(collector: tuple[str, list[Any]]) -> None:
    url, received = collector
    tracer = Tracer(TracingConfig(exporter="otlp", endpoint=url), "ingress")
    tracer.record("queue", CLIENT, 1.0, 2.0, {"mell.request_id": "r1"})
    tracer.flush()
    (resource,) = received[0].resource_spans
    names = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert names["service.name"] == "mell-ray-ingress"
    (span,) = resource.scope_spans[0].spans
    assert (span.name, span.trace_id.hex()) == ("queue", TRACE_ID)


def test_missing_exporter_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracing(TracingConfig(exporter="otlp"))
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"mell-ray\[tracing\]"):
        check_tracing(TracingConfig(exporter="otlp"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("exporter", "jaeger"), ("endpoint", "collector:4318"), ("sample_ratio", 2), ("colour", 1)],
)
def test_wrong_settings_are_named(setting: str, value: Any) -> None:
    llm = {"model_loading_config": {"model_id": "m", "model_source": "builtin"}}
    mell = {"observability": {"tracing": {setting: value}}}
    with pytest.raises(ConfigError, match=rf"mell\.observability\.tracing\.{setting}"):
        MellConfig.parse({"llm_configs": [llm], "mell": mell})
