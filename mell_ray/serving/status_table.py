"""The tables of ``mell-ray status``."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 12
MAX_REQUESTS = 30
_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "draining": "magenta",
    "asleep": "blue",
    "lent": "cyan",
}


def render(state: dict[str, Any]) -> RenderableType:
    """Replicas with their KV pools as bars, then the requests (the largest if there are many)."""
    return Group(_replicas(state["replicas"]), _requests(state["requests"]), _footer(state))


def _replicas(replicas: list[dict[str, Any]]) -> Table:
    table = Table(title="Replicas", title_justify="left", expand=False)
    for name in ("replica", "model", "state", "KV blocks", "", "running", "waiting", "pid"):
        table.add_column(
            name,
            justify="right" if name in ("running", "waiting", "pid") else "left",
            no_wrap=name in ("replica", "KV blocks", ""),
        )
    for replica in replicas:
        used, capacity = replica["used_blocks"], replica["capacity_blocks"]
        table.add_row(
            replica["id"],
            replica["model"],
            Text(replica["state"], style=_STYLES.get(replica["state"], "")),
            _bar(used / capacity if capacity else 0.0),
            f"{used}/{capacity}",
            str(replica["running"]),
            str(replica["waiting"]),
            str(replica["pid"] or "-"),
        )
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    table = Table(title="Requests", title_justify="left", expand=False)
    for name in ("request", "replica", "tokens", "blocks", "migrations"):
        table.add_column(
            name,
            justify="left" if name in ("request", "replica") else "right",
            no_wrap=name == "request",
        )
    largest = sorted(requests, key=lambda request: -request["tokens"])
    for request in largest[:MAX_REQUESTS]:
        table.add_row(
            request["id"],
            request["replica"],
            str(request["tokens"]),
            str(request["blocks"]),
            str(request["migrations"]),
        )
    return table


def _footer(state: dict[str, Any]) -> Text:
    hidden = max(0, len(state["requests"]) - MAX_REQUESTS)
    parts = [f"{len(state['requests'])} running", f"{len(state['queued'])} queued"]
    if hidden:
        parts.append(f"{hidden} not shown")
    return Text(", ".join(parts), style="dim")


def _bar(share: float) -> Text:
    filled = round(share * BAR_WIDTH)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    return Text("█" * filled, style=style) + Text("·" * (BAR_WIDTH - filled), style="dim")
