"""The parts of a Grafana dashboard: rows of panels, each with PromQL queries. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 39
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

PanelKind = Literal["timeseries", "stat"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. ``unit`` is Grafana's; ``width`` in the grid of 24 columns; ``stacked`` adds the
    series up; ``alarm``: a stat that turns red from this value on."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: PanelKind = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    alarm: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def render_rows(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Panels with ids and places: each row's title, then its panels from left to right."""
    rendered: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        rendered.append(
            {
                "id": len(rendered) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            }
        )
        top += 1
        for panel, x, y in _places(row.panels, top):
            rendered.append(_panel(panel, len(rendered) + 1, x, y))
        top = max(item["gridPos"]["y"] + item["gridPos"]["h"] for item in rendered)
    return rendered


def _places(panels: tuple[Panel, ...], top: int) -> Iterator[tuple[Panel, int, int]]:
    x = tallest = 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, top, tallest = 0, top + tallest, 0
        yield panel, x, top
        x, tallest = x + panel.width, max(tallest, panel.height)


def _panel(panel: Panel, panel_id: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": panel.kind == "timeseries",
                "instant": panel.kind == "stat",
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "noValue": "–"}
    if panel.kind == "stat":
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if panel.alarm is not None:
            steps.append({"color": "red", "value": panel.alarm})
        return {**defaults, "thresholds": {"mode": "absolute", "steps": steps}}
    custom = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 25 if panel.stacked else 6,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }
    return {**defaults, "custom": custom}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "value",
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
