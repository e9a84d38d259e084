"""Metrics and the status page's data, from a live application under traffic."""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from mell_ray.builtin import MODEL_ID
from mell_ray.observability.catalog import METRICS
from mell_ray.observability.dashboard import render
from mell_ray.serving.page import KEEP_S
from tests.observability.prometheus import find_prometheus, prometheus
from tests.serving.conftest import LENGTHS, TIMEOUT_S, App, outlasting, wait_for


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def app(deploy, traces: Path) -> App:
    # The policy leaves moves to the tests; only requests that bring a trace are traced.
    tracing = {"exporter": "file", "directory": str(traces), "sample_ratio": 0.0}
    mell = {"policy": {"name": "worst-fit"}, "observability": {"tracing": tracing}}
    app = deploy("observe", replicas=(2, 2), mell=mell)
    app.wait_ready(2)
    return app


@pytest.fixture(scope="module", autouse=True)
def served(app: App) -> dict:
    """Traffic with a migration in each mode; what the last live view of it was like."""
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(complete, app, f"Chapter {i}. It was", 60) for i in range(4)]
        seen = {mode: move_one(app, mode) for mode in ("kv", "token")}
        tokens = sum(future.result() for future in pending)
    app.wait_idle()
    return {"tokens": tokens, **seen}


def complete(app: App, prompt: str, length: int) -> int:
    body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": length, "ignore_eos": True}
    answer = httpx.post(f"{app.url}/v1/completions", json=body, timeout=TIMEOUT_S).json()
    return answer["usage"]["completion_tokens"]


def move_one(app: App, mode: str) -> dict:
    return outlasting(lambda length: moved(app, mode, length), LENGTHS)[0]


def moved(
    app: App, mode: str, length: int, headers: dict[str, str] | None = None, **options: Any
) -> tuple[dict, list[str]] | None:
    """A stream that is moved: what is told of its move, and its data. None: it had ended."""
    url = f"{app.url}/v1/completions"
    body = {
        "model": MODEL_ID,
        "prompt": f"{mode}: a",
        "max_tokens": length,
        "ignore_eos": True,
        "stream": True,
        **options,
    }
    with httpx.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT_S) as response:
        lines = response.iter_lines()
        next(lines)
        request = response.headers["x-request-id"]
        answer = app.post(f"requests/{request}/migrate", {"to": None, "mode": mode})
        events = [line.removeprefix("data: ") for line in lines if line]
    if answer.status_code == 404 or answer.json()["outcome"] == "gone":
        return None
    assert answer.json()["outcome"] == "committed", answer.text
    return answer.json(), events


def scrape() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx.get(url, timeout=TIMEOUT_S).text


def samples(text: str) -> dict[str, float]:
    """Sums by exported name."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_mell_"):
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def test_every_metric_is_exported(served: dict) -> None:
    wanted = {
        metric.exported + ("_count" if metric.kind == "histogram" else "") for metric in METRICS
    }
    tokens = served["tokens"] + 2 * LENGTHS[0]
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        sums = samples(scrape())
        enough = sums.get("ray_mell_generation_tokens_total", 0) >= tokens
        if (wanted <= set(sums) and enough) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert wanted <= set(sums)
    assert sums["ray_mell_generation_tokens_total"] >= tokens
    assert sums["ray_mell_exactly_once_violations_total"] == 0
    assert sums["ray_mell_migration_bytes_total"] >= served["kv"]["bytes"] > 0
    assert sums["ray_mell_gpu_seconds_total"] > 0
    assert sums["ray_mell_time_to_first_token_seconds_count"] >= 6


def test_live_view_shows_gpus_moves_and_rates(app: App) -> None:
    for mode in ("token", "kv"):  # what was served before may be too long ago to count
        move_one(app, mode)

    def complete_view(view: dict) -> dict | None:
        rates = view["rates"]
        told = rates["ttft_p50_ms"] is not None and rates["stall_max_ms"] is not None
        return view if told and len(view["history"]["used"]) > 1 else None

    def look() -> dict:
        return httpx.get(f"{app.url}/mell/v1/live", timeout=TIMEOUT_S).json()

    view = wait_for(complete_view, look, "no rates or no history")
    assert {gpu["id"] for gpu in view["gpus"]} == {r["id"] for r in app.state()["replicas"]}
    moves = [move for move in view["moves"] if move["outcome"] != "gone"]
    assert [move["mode"] for move in moves[-2:]] == ["token", "kv"]
    assert all(move["outcome"] == "committed" for move in moves)
    assert view["rates"]["stall_max_ms"] > 0
    assert max(view["history"]["used"]) >= 1
    assert max(view["history"]["bound"]) >= 1


def test_status_page_is_served_and_may_load_nothing_from_elsewhere(app: App) -> None:
    answer = httpx.get(f"{app.url}/mell", timeout=TIMEOUT_S)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<title>mell-ray</title>" in answer.text


def test_many_viewers_cost_one_look_a_second(app: App) -> None:
    url = f"{app.url}/mell/v1/live"
    started = time.monotonic()
    with httpx.Client(timeout=TIMEOUT_S) as client:
        views = [client.get(url).json()["time"] for _ in range(30)]
    # The first one may be as old as they become, and so be followed by another at once.
    assert len(set(views)) <= (time.monotonic() - started) / KEEP_S + 2


TRACED = {"x-mell-trace": "1"}


def test_trace_says_where_the_time_went(app: App) -> None:
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 12, "ignore_eos": True, "n": 2}
    answer = httpx.post(f"{app.url}/v1/completions", json=body, headers=TRACED, timeout=TIMEOUT_S)
    trace = answer.json()["mell_trace"]
    assert trace["request_id"] == answer.headers["x-request-id"]
    assert [choice["index"] for choice in trace["choices"]] == [0, 1]
    ids = {replica["id"] for replica in app.state()["replicas"]}
    for choice in trace["choices"]:
        parts = [choice[name] for name in ("queue_ms", "prefill_ms", "decode_ms")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(choice["total_ms"], abs=0.01)
        assert choice["tokens"] == sum(stay["tokens"] for stay in choice["replicas"]) == 12
        assert {stay["id"] for stay in choice["replicas"]} <= ids
    plain = httpx.post(f"{app.url}/v1/completions", json=body, timeout=TIMEOUT_S).json()
    assert "mell_trace" not in plain


def test_trace_of_a_stream_comes_last_and_tells_of_migrations(app: App) -> None:
    def attempt(length: int) -> tuple[int, dict, list[str]] | None:
        options = {"stream_options": {"include_usage": True}}
        found = moved(app, "kv", length, TRACED, **options)
        return found and (length, *found)

    length, move, events = outlasting(attempt)
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"] == []
    (choice,) = last["mell_trace"]["choices"]
    assert choice["migrations"] == 1
    assert [stall["kind"] for stall in choice["stalls"]] == ["migration"]
    assert [stay["id"] for stay in choice["replicas"]] == [move["from"], move["to"]]
    assert sum(stay["tokens"] for stay in choice["replicas"]) == choice["tokens"] == length
    assert json.loads(events[-3])["usage"]["completion_tokens"] == length


def test_trace_header_must_be_0_or_1(app: App) -> None:
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 1}
    headers = {"x-mell-trace": "please"}
    answer = httpx.post(f"{app.url}/v1/completions", json=body, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-mell-trace"


def test_spans_tell_of_the_request_on_both_replicas_and_of_its_move(app: App, traces: Path) -> None:
    tried: list[str] = []

    def attempt(length: int) -> dict | None:
        tried.append(uuid.uuid4().hex)
        headers = {"traceparent": f"00-{tried[-1]}-00f067aa0ba902b7-01"}
        found = moved(app, "kv", length, headers)
        return found and found[0]

    move = outlasting(attempt)
    expected = {
        ("completion", None),
        ("generate", "completion"),
        ("queue", "generate"),
        ("prefill", "generate"),
        ("decode", "generate"),
        ("engine", "generate"),
        ("engine.step", "engine"),
        ("migration", "generate"),
        ("freeze", "migration"),
    }

    def written() -> list[dict]:
        return [span for path in traces.glob("*.jsonl") for span in spans_of(path)]

    def complete_trace(spans: list[dict]) -> list[dict] | None:
        """The spans, once all are there; each process writes its own when it comes to it."""
        mine = [span for span in spans if span["context"]["trace_id"] == f"0x{tried[-1]}"]
        engines = [span for span in mine if span["name"] == "engine"]
        return mine if parents(mine) >= expected and len(engines) == 2 else None

    spans = wait_for(complete_trace, written, "not all spans are written")
    assert parents(spans) == expected
    assert {span["context"]["trace_id"] for span in written()} == {f"0x{each}" for each in tried}
    stays = [span["attributes"] for span in spans if span["name"] == "engine"]
    assert {stay["mell.replica"] for stay in stays} == {move["from"], move["to"]}
    assert {stay["mell.left"] for stay in stays} == {"moved", "length"}
    services = {span["resource"]["attributes"]["service.name"] for span in spans}
    assert services == {"mell-ray-ingress", "mell-ray-router", "mell-ray-replica"}
    assert "kv: a" not in json.dumps(spans), "no request text"


def parents(spans: list[dict]) -> set[tuple[str, str | None]]:
    """Names of spans and of those above them."""
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    return {(span["name"], names.get(span["parent_id"])) for span in spans}


def spans_of(path: Path) -> list[dict]:
    complete_lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in complete_lines]


@pytest.mark.skipif(
    find_prometheus() is None,
    reason="no prometheus here (Debian's package has that name; .ci/tools unpacks it)",
)
def test_every_panel_s_query_returns_data(app: App, tmp_path: Path) -> None:
    """A real Prometheus scrapes the cluster while requests run and move; a query is done with once
    it has given a number."""
    open_queries = {
        (panel["title"], target["expr"])
        for panel in render()["panels"]
        for target in panel.get("targets", ())
    }
    stop = threading.Event()
    node = ray.nodes()[0]
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    with prometheus(target, tmp_path) as server, ThreadPoolExecutor(3) as pool:
        work = [pool.submit(keep_busy, app, stop), pool.submit(keep_moving, app, stop)]
        try:
            deadline = time.monotonic() + 200
            while open_queries:
                open_queries = {
                    query for query in open_queries if not server.query(concrete(query[1]))
                }
                assert not any(task.done() for task in work)
                assert time.monotonic() < deadline, sorted(open_queries)
                time.sleep(0.5)
        finally:
            stop.set()
        for task in work:
            task.result()
    app.wait_idle()


def concrete(expr: str) -> str:
    """A panel's query as Grafana sends it, with everything selected."""
    values = {"$__rate_interval": "30s", "$__range": "1m", "$cluster": ".*", "$model": ".*"}
    for name, value in values.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def keep_busy(app: App, stop: threading.Event) -> None:
    while not stop.is_set():
        complete(app, "It is a truth universally acknowledged", 8)


def keep_moving(app: App, stop: threading.Event) -> None:
    while not stop.is_set():
        move_one(app, "kv")
