"""A loopback server that keeps Grafana's documented contract for what we call. Not Grafana."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "glsa_test"


@dataclass
class FakeGrafana:
    """State of the server; tests read and bend it."""

    url: str = ""
    prefix: str = ""
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)  # by uid
    folder_of: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)  # title -> uid
    datasources: list[dict[str, Any]] = field(default_factory=list)
    broken: tuple[int, str] | None = None  # every call answers this
    forbidden: bool = False  # the token may only read
    hangs: threading.Event | None = None  # nothing is answered before it is set
    writes: int = 0

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, Any]:
        if self.broken is not None:
            return self.broken
        if token != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        if method == "POST" and self.forbidden:
            return 403, {"message": "Access denied"}
        self.writes += method == "POST"
        match method, path.split("/")[1:]:
            case "GET", ["api", "dashboards", "uid", uid]:
                found = self.dashboards.get(uid)
                if found is None:
                    return 404, {"message": "Dashboard not found"}
                return 200, {"dashboard": found, "meta": {"folderUid": self.folder_of[uid]}}
            case "POST", ["api", "dashboards", "db"]:
                return self._save(body)
            case "GET", ["api", "folders"]:
                return 200, [{"uid": uid, "title": title} for title, uid in self.folders.items()]
            case "POST", ["api", "folders"]:
                if body["title"] in self.folders:
                    return 409, {"message": "a folder with the same name already exists"}
                self.folders[body["title"]] = f"folder{len(self.folders)}"
                return 200, {"uid": self.folders[body["title"]], "title": body["title"]}
            case "GET", ["api", "datasources"]:
                return 200, self.datasources
            case "POST", ["api", "datasources"]:
                made = {**body, "uid": f"source{len(self.datasources)}"}
                self.datasources.append(made)
                return 200, {"datasource": made, "message": "Datasource added"}
        return 404, {"message": "Not found"}

    def _save(self, body: Any) -> tuple[int, Any]:
        wanted = body["dashboard"]
        if body["folderUid"] not in self.folders.values():
            return 400, {"message": "folder not found"}
        found = self.dashboards.get(wanted["uid"])
        stale = found is not None and wanted.get("version") != found["version"]
        if stale and not body["overwrite"]:
            return 412, {"status": "version-mismatch", "message": "changed by someone else"}
        version = (found["version"] if found else 0) + 1
        self.dashboards[wanted["uid"]] = {**wanted, "id": 7, "version": version}
        self.folder_of[wanted["uid"]] = body["folderUid"]
        return 200, {"uid": wanted["uid"], "version": version, "status": "success"}


@contextmanager
def serving(prefix: str = "") -> Iterator[FakeGrafana]:
    """The server at ``url``, which has ``prefix`` in its path."""
    grafana = FakeGrafana(prefix=prefix)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._handle("GET")

        def do_POST(self) -> None:
            self._handle("POST")

        def _handle(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if grafana.hangs is not None:
                grafana.hangs.wait(120)
            path = self.path.removeprefix(prefix) if self.path.startswith(prefix) else "/lost"
            token = self.headers.get("Authorization", "")
            status, answer = grafana.answer(method, path, token, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            with contextlib.suppress(ConnectionError):  # one test does not wait for the answer
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    grafana.url = f"http://127.0.0.1:{server.server_address[1]}{prefix}"
    try:
        yield grafana
    finally:
        server.shutdown()
        server.server_close()
