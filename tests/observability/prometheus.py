"""A real Prometheus that scrapes one target every second."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.ports import free_port

TIMEOUT_S = 120.0


def find_prometheus() -> str | None:
    return shutil.which("prometheus")


class Prometheus:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def query(self, expr: str) -> list[float]:
        """The values of an instant query's series that are numbers."""
        answer = self._http.post("/api/v1/query", data={"query": expr})
        assert answer.status_code == 200, f"{expr}: {answer.text}"
        values = [float(series["value"][1]) for series in answer.json()["data"]["result"]]
        return [value for value in values if math.isfinite(value)]

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def prometheus(target: str, scratch: Path) -> Iterator[Prometheus]:
    """``target``: host:port whose /metrics is scraped."""
    binary = find_prometheus()
    assert binary is not None
    address = f"127.0.0.1:{free_port()}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    (scratch / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with (scratch / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={scratch / 'prometheus.yaml'}",
                f"--storage.tsdb.path={scratch / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://{address}")
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not server.is_ready():
            assert process.poll() is None, (scratch / "prometheus.log").read_text()
            assert time.monotonic() < deadline, (scratch / "prometheus.log").read_text()
            time.sleep(0.05)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(timeout=TIMEOUT_S)
