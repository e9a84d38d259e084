"""Brings the dashboard into a Grafana, without taking back what people changed there."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mell_ray.observability.dashboard import TITLE, UID, render
from mell_ray.observability.grafana import GrafanaError

Action = Literal["create", "update", "none"]

# Grafana writes these itself.
_OWN_FIELDS = ("id", "version")
_STAMP = "generated:"


class Server(Protocol):
    """What of a Grafana is used here; see ``grafana.Grafana``."""

    url: str

    def find_dashboard(self, uid: str) -> dict[str, Any] | None: ...

    def save_dashboard(
        self, dashboard: dict[str, Any], folder_uid: str, *, overwrite: bool, message: str
    ) -> dict[str, Any]: ...

    def find_folder(self, title: str) -> str | None: ...

    def create_folder(self, title: str) -> str: ...

    def datasources(self) -> list[dict[str, Any]]: ...

    def create_datasource(self, name: str, prometheus_url: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for. ``datasource``: by name; None leaves the choice to Grafana."""

    folder: str = TITLE
    datasource: str | None = None
    prometheus_url: str | None = None
    force: bool = False
    dry_run: bool = False


def push(server: Server, wish: Wish) -> list[str]:
    """Create or update the dashboard and what it needs; returns what was done, in words.

    A dashboard that someone has changed by hand is left alone unless ``wish.force``.

    Raises:
        GrafanaError: with what to do about it.
    """
    done: list[str] = []
    dashboard = render()
    if wish.datasource is not None:
        source = _datasource(server, wish, done)
        dashboard["templating"]["list"][0]["current"] = {
            "text": wish.datasource,
            "value": source,
        }
    stamp(dashboard)
    found = server.find_dashboard(UID)
    action = decide(dashboard, None if found is None else found["dashboard"], force=wish.force)
    if action == "none":
        return [*done, f"the dashboard is up to date: {server.url}/d/{UID}"]
    folder = _folder(server, wish, done)
    if wish.dry_run:
        return [*done, f"would {action} the dashboard {TITLE!r} in folder {wish.folder!r}"]
    if found is not None:
        dashboard["version"] = found["dashboard"]["version"]
    try:
        answer = server.save_dashboard(
            dashboard, folder, overwrite=wish.force, message="mell-ray dashboards push"
        )
    except GrafanaError as error:
        if error.status == 412:
            raise _changed() from None
        raise
    return [*done, f"{action}d {server.url}/d/{UID}, version {answer['version']}"]


def decide(wanted: dict[str, Any], found: dict[str, Any] | None, *, force: bool) -> Action:
    """What is to be done with a dashboard that is (``found``) or is not there.

    Raises:
        GrafanaError: it was changed by hand, and ``force`` is not given.
    """
    if found is None:
        return "create"
    if _content(found) == _content(wanted):
        return "none"
    if not force and _stamp_of(found) != _hash(found):
        raise _changed()
    return "update"


def stamp(dashboard: dict[str, Any]) -> None:
    """Note the content's hash in a tag, to tell later whether anybody has changed it."""
    dashboard["tags"].append(f"{_STAMP}{_hash(dashboard)}")


def _changed() -> GrafanaError:
    return GrafanaError(
        "the dashboard was changed in Grafana since it was pushed; --force replaces it (its "
        "history there keeps the change)",
        412,
    )


def _datasource(server: Server, wish: Wish, done: list[str]) -> str:
    """The uid of the data source asked for."""
    assert wish.datasource is not None
    known = {source["name"]: source for source in server.datasources()}
    source = known.get(wish.datasource)
    if source is None and wish.prometheus_url is not None:
        if wish.dry_run:
            done.append(f"would create data source {wish.datasource!r} ({wish.prometheus_url})")
            return ""
        source = server.create_datasource(wish.datasource, wish.prometheus_url)
        done.append(f"created data source {wish.datasource!r} ({wish.prometheus_url})")
    if source is None:
        names = ", ".join(repr(n) for n, s in known.items() if s["type"] == "prometheus")
        raise GrafanaError(
            f"there is no data source {wish.datasource!r}; Prometheus ones are: {names or 'none'}. "
            "--prometheus-url creates it"
        )
    if source["type"] != "prometheus":
        raise GrafanaError(
            f"data source {wish.datasource!r} is of type {source['type']!r}, not 'prometheus'"
        )
    return source["uid"]


def _folder(server: Server, wish: Wish, done: list[str]) -> str:
    """The uid of the folder asked for, which is created where it is missing."""
    uid = server.find_folder(wish.folder)
    if uid is not None:
        return uid
    if wish.dry_run:
        done.append(f"would create folder {wish.folder!r}")
        return ""
    done.append(f"created folder {wish.folder!r}")
    return server.create_folder(wish.folder)


def _content(dashboard: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dashboard.items() if key not in _OWN_FIELDS}


def _hash(dashboard: dict[str, Any]) -> str:
    content = copy.copy(_content(dashboard))
    content["tags"] = [tag for tag in content.get("tags", []) if not tag.startswith(_STAMP)]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _stamp_of(dashboard: dict[str, Any]) -> str | None:
    for tag in dashboard.get("tags", []):
        if tag.startswith(_STAMP):
            return tag.removeprefix(_STAMP)
    return None
