"""The dashboard: what is committed, how it is built, and how it gets into a Grafana."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from mell_ray.cli import app
from mell_ray.observability import dashboard
from mell_ray.observability.catalog import METRICS
from mell_ray.observability.dashboard import UID, render
from mell_ray.observability.panels import COLUMNS
from tests.observability.fake_grafana import TOKEN, FakeGrafana, serving


def panels() -> list[dict[str, Any]]:
    return [panel for panel in render()["panels"] if panel["type"] != "row"]


def test_committed_dashboard_is_the_generated_one() -> None:
    assert dashboard.PATH.read_text() == dashboard.text()


def test_structure_is_what_grafana_expects() -> None:
    model = render()
    assert len(model["uid"]) <= 40
    assert model["id"] is None
    ids = [panel["id"] for panel in model["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["description"]
        assert panel["type"] in ("timeseries", "stat")
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert 'ray_io_cluster=~"$cluster"' in target["expr"]
    assert len(dashboard.text()) < 1 << 20  # what a ConfigMap may hold


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in render()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_metric_has_a_panel_and_no_panel_an_unknown_metric() -> None:
    text = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    shown = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bray_mell_[a-z_]+", text)}
    assert shown == {metric.exported for metric in METRICS}


# --- push --------------------------------------------------------------------------------------


@pytest.fixture
def grafana(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGrafana]:
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    with serving() as server:
        yield server


def push(grafana: FakeGrafana, *options: str) -> tuple[int, str]:
    arguments = ["dashboards", "push", "--url", grafana.url, *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_first_push_creates_folder_and_dashboard(grafana: FakeGrafana) -> None:
    code, output = push(grafana, "--folder", "GPUs")
    assert code == 0
    assert f"{grafana.url}/d/{UID}, version 1" in output
    assert grafana.folder_of[UID] == grafana.folders["GPUs"]
    assert len(grafana.dashboards[UID]["panels"]) == len(render()["panels"])


def test_second_push_finds_nothing_to_do(grafana: FakeGrafana) -> None:
    push(grafana)
    writes = grafana.writes
    code, output = push(grafana)
    assert (code, grafana.writes) == (0, writes)
    assert "up to date" in output


def test_newer_dashboard_replaces_an_older_pushed_one(
    grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mell_ray.observability.dashboard.ROWS", dashboard.ROWS[:1])
        push(grafana)
    code, output = push(grafana)
    assert code == 0
    assert "version 2" in output
    assert len(grafana.dashboards[UID]["panels"]) == len(render()["panels"])


def test_what_was_changed_by_hand_is_kept_unless_forced(grafana: FakeGrafana) -> None:
    push(grafana)
    grafana.dashboards[UID]["title"] = "mine"
    grafana.dashboards[UID]["version"] = 5
    code, output = push(grafana)
    assert code == 1
    assert "--force" in output
    assert grafana.dashboards[UID]["title"] == "mine"
    code, output = push(grafana, "--force")
    assert code == 0
    assert grafana.dashboards[UID]["title"] == "mell-ray"
    assert "version 6" in output


def test_change_between_look_and_save_is_not_overwritten(
    grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mell_ray.observability.dashboard.ROWS", dashboard.ROWS[:1])
        push(grafana)
    answer = FakeGrafana.answer

    def racing(self: FakeGrafana, method: str, path: str, *rest: Any) -> tuple[int, Any]:
        if method == "POST":
            self.dashboards[UID]["version"] += 1
        return answer(self, method, path, *rest)

    monkeypatch.setattr(FakeGrafana, "answer", racing)
    code, output = push(grafana)
    assert code == 1
    assert "--force" in output


def test_dry_run_writes_nothing(grafana: FakeGrafana) -> None:
    options = ["--datasource", "Prom", "--prometheus-url", "http://prometheus:9090"]
    code, output = push(grafana, "--dry-run", *options)
    assert (code, grafana.writes) == (0, 0)
    for part in ("would create data source", "would create folder", "would create the dashboard"):
        assert part in output


def test_data_source_is_chosen_by_name(grafana: FakeGrafana) -> None:
    grafana.datasources.append({"name": "Prom", "type": "prometheus", "uid": "p1"})
    grafana.datasources.append({"name": "Logs", "type": "loki", "uid": "l1"})
    code, _ = push(grafana, "--datasource", "Prom")
    assert code == 0
    variable = grafana.dashboards[UID]["templating"]["list"][0]
    assert variable["current"] == {"text": "Prom", "value": "p1"}
    code, output = push(grafana, "--datasource", "Prm")
    assert code == 1
    assert "'Prom'" in output
    code, output = push(grafana, "--datasource", "Logs")
    assert code == 1
    assert "loki" in output


def test_missing_data_source_is_created_where_its_address_is_given(grafana: FakeGrafana) -> None:
    code, output = push(
        grafana, "--datasource", "Prom", "--prometheus-url", "http://prometheus:9090"
    )
    assert code == 0
    assert "created data source 'Prom'" in output
    assert grafana.datasources[0]["url"] == "http://prometheus:9090"


def test_grafana_under_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    with serving("/grafana") as grafana:
        assert push(grafana)[0] == 0
        assert UID in grafana.dashboards


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ((500, {"message": "database is locked"}), "database is locked"),
        ((502, "Bad gateway, a message for nobody"), "no usable answer"),
        ((200, ""), "127.0.0.1"),
        ((404, "<html>not Grafana</html>"), "404"),
    ],
    ids=["500", "502-text", "empty", "404-html"],
)
def test_trouble_is_one_line(grafana: FakeGrafana, broken: tuple, words: str) -> None:
    grafana.broken = broken
    code, output = push(grafana)
    assert code == 1
    assert output.startswith("error: ")
    assert words in output
    assert len(output.strip().splitlines()) == 1


def test_tokens_that_are_missing_wrong_or_weak(
    grafana: FakeGrafana, monkeypatch: pytest.MonkeyPatch
) -> None:
    grafana.forbidden = True
    code, output = push(grafana)
    assert code == 1
    assert "Editor" in output
    monkeypatch.setenv("GRAFANA_TOKEN", "wrong-token")
    code, output = push(grafana)
    assert code == 1
    assert "GRAFANA_TOKEN" in output
    assert "wrong-token" not in output
    monkeypatch.delenv("GRAFANA_TOKEN")
    code, output = push(grafana)
    assert code == 2
    assert "GRAFANA_TOKEN" in output


def test_server_that_hangs_or_is_not_there(grafana: FakeGrafana) -> None:
    grafana.hangs = threading.Event()
    code, output = push(grafana, "--timeout-s", "0.1")
    grafana.hangs.set()
    assert code == 1
    assert "does not answer in time" in output
    grafana.url = "http://127.0.0.1:1"
    code, output = push(grafana)
    assert code == 1
    assert "cannot be reached" in output
    grafana.url = "grafana.example"
    code, output = push(grafana)
    assert code == 2
    assert "--url" in output


def test_export_prints_what_is_committed() -> None:
    result = CliRunner().invoke(app, ["dashboards", "export", "dashboard"])
    assert json.loads(result.output) == render()
    result = CliRunner().invoke(app, ["dashboards", "export", "alerts"])
    assert "MellRouterAbsent" in result.output
