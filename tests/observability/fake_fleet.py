"""A fleet that does not exist, for the status page: its data is built by the page's own code."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mell_ray.observability.activity import Activity
from mell_ray.observability.pulse import Pulse
from mell_ray.observability.view import gpu_views
from mell_ray.serving.page import HEADERS, status_page

CAPACITY = 256


@dataclass
class FakeFleet:
    """Written by tests, read by the server below."""

    gpus: list[str]
    requests: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> (GPU, blocks)
    states: dict[str, str] = field(default_factory=dict)
    moves: list[dict[str, Any]] = field(default_factory=list)
    migrating: set[str] = field(default_factory=set)
    reserved: dict[str, int] = field(default_factory=dict)  # GPU -> blocks for what is to come
    activity: Activity = field(default_factory=Activity)
    key: str | None = None
    looks: int = 0
    clock: float = 1000.0

    @classmethod
    def random(cls, num_gpus: int, seed: int = 7) -> FakeFleet:
        """GPUs mostly full, a few idle, one starting, one draining where there are enough."""
        rng = random.Random(seed)
        fleet = cls([f"mell-{rng.randrange(1 << 16):04x}" for _ in range(num_gpus)])
        for gpu in fleet.gpus:
            free = int(CAPACITY * rng.choice([0.98, 0.97, 0.95, 0.93, 0.9, 0.8]))
            while free > 10:
                blocks = min(free, max(2, int(rng.lognormvariate(2.6, 0.9))))
                free -= blocks
                fleet.requests[f"{rng.getrandbits(48):012x}"] = (gpu, blocks)
        if num_gpus > 3:
            fleet.states = {fleet.gpus[-1]: "starting", fleet.gpus[-2]: "draining"}
            gone = fleet.gpus[-1]
            fleet.requests = {k: v for k, v in fleet.requests.items() if v[0] != gone}
        for i in range(300):
            wave = 0.72 + 0.2 * math.sin(i / 40) + 0.03 * math.sin(i / 7)
            used = max(1, round(num_gpus * wave))
            slack = (i // 37) % 3 if used > 4 else 0
            bound = max(1, used - slack * max(1, num_gpus // 60))
            held = max(used, min(num_gpus, used + max(1, num_gpus // 30)))
            fleet.activity.heard(
                Pulse(38 * used + rng.randrange(9 * used), (0.04,), (0.021,), (0.006,)),
                fleet.clock,
            )
            fleet.activity.point(fleet.clock, open_gpus=held, used=used, lower_bound=bound)
            fleet.clock += 1.0
        fleet.moves = [fleet._move(rng, 16 * i) for i in range(8, 0, -1)] if num_gpus > 1 else []
        return fleet

    def _move(self, rng: random.Random, ago: int) -> dict[str, Any]:
        src, dst = rng.sample(self.gpus, 2)
        failed = rng.random() < 0.12
        return {
            "at": self.clock - ago,
            "request": next(iter(self.requests)),
            "from": src,
            "to": dst,
            "mode": rng.choice(["kv", "token"]),
            "reason": rng.choice(["consolidate", "make-room", "evacuate"]),
            "outcome": "aborted" if failed else "committed",
            "ms": 40.0,
            "stall_ms": round(rng.uniform(3, 12), 1),
            "bytes": 1 << 20,
        }

    def view(self) -> dict[str, Any]:
        on: dict[str, list[int]] = {gpu: [] for gpu in self.gpus}
        for gpu, blocks in self.requests.values():
            on[gpu].append(blocks)
        replicas = [self._replica(gpu, on[gpu]) for gpu in self.gpus]
        requests = [
            {"id": name, "replica": gpu, "blocks": blocks, "migrations": 0}
            for name, (gpu, blocks) in self.requests.items()
        ]
        state = {"replicas": replicas, "requests": requests}
        return {
            "time": self.clock,
            "policy": "tide",
            "models": ["example/model-8b"],
            "lower_bound": -(-sum(map(sum, on.values())) // CAPACITY),
            "queued": 0,
            "gpus": gpu_views(state, self.migrating),
            "rates": self.activity.rates(self.clock),
            "history": self.activity.history(self.clock),
            "moves": self.moves,
        }

    def _replica(self, gpu: str, sizes: list[int]) -> dict[str, Any]:
        used = sum(sizes) + self.reserved.get(gpu, 0)
        state = self.states.get(gpu, "ready")
        return {
            "id": gpu,
            "model": "example/model-8b",
            "state": state,
            "node": None if state == "starting" else "3f9a2c417b",
            "capacity_blocks": 0 if state == "starting" else CAPACITY,
            "used_blocks": used,
            "cached_blocks": min(CAPACITY - used, 9) if state == "ready" else 0,
            "running": len(sizes),
            "waiting": 0,
        }


@contextmanager
def serving(fleet: FakeFleet) -> Iterator[str]:
    """URL of a server with the page and the fleet's data, with an ingress's headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/mell":
                self._answer(200, "text/html; charset=utf-8", status_page(), HEADERS)
            elif self.path == "/mell/v1/live":
                given = self.headers.get("Authorization")
                if fleet.key is not None and given != f"Bearer {fleet.key}":
                    self._answer(401, "application/json", b"{}", {})
                    return
                fleet.looks += 1
                self._answer(200, "application/json", json.dumps(fleet.view()).encode(), {})
            else:
                self._answer(404, "text/plain", b"", {})

        def _answer(self, code: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
