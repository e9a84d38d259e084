"""One Ray cluster and one Serve for the session; applications per module."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

# Ray and Serve read these when they are imported.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.02",
    RAY_USAGE_STATS_ENABLED="0",
    # Where tests of migrations put the faults that are to strike; see mell_ray.migration.faults.
    MELL_RAY_FAULTS=tempfile.mkdtemp(prefix="mell-faults-"),
    RAY_metrics_report_interval_ms="1000",
)

import httpx
import openai
import pytest
import ray
from ray import serve

from mell_ray.builtin import MODEL_ID
from mell_ray.serving import build_openai_app
from tests.ports import free_port

# For the processes of the cluster, not for this one, which calls handles without an event loop.
os.environ.update(
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD="0",
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="0",
    RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S="1",
)

CPU_SLOTS = 8
TIMEOUT_S = 240.0  # of whatever ends by itself, unless something is broken
LENGTHS = (400, 1200, 3600)  # in tokens; the longest nearly fills a context

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class App:
    """A running application and ways to talk to it."""

    name: str
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    def state(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/mell/v1/state", timeout=TIMEOUT_S).raise_for_status().json()

    def migrations(self) -> list[dict[str, Any]]:
        url = f"{self.url}/mell/v1/migrations"
        return httpx.get(url, timeout=TIMEOUT_S).raise_for_status().json()["migrations"]

    def post(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return httpx.post(f"{self.url}/mell/v1/{path}", json=body or {}, timeout=TIMEOUT_S)

    def wait(self, condition: Callable[[dict[str, Any]], Any], message: str) -> Any:
        """The first true value of ``condition(state)``."""
        return wait_for(condition, self.state, message)

    def wait_ready(self, count: int) -> list[str]:
        """Ids of the ready replicas, once there are ``count`` of them."""

        def enough(state: dict[str, Any]) -> list[str] | None:
            ids = [r["id"] for r in state["replicas"] if r["state"] == "ready"]
            return ids if len(ids) == count else None

        return self.wait(enough, f"no {count} ready replicas")

    def wait_idle(self) -> None:
        """Until no replica holds a block and no request is anywhere."""
        self.wait(
            lambda s: (
                not s["requests"]
                and not s["queued"]
                and all(r["used_blocks"] == r["running"] == 0 for r in s["replicas"])
            ),
            "requests or blocks are left",
        )

    def actor(self, replica_id: str) -> Any:
        return ray.get_actor(replica_id, namespace=f"mell.{self.name}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """URL of the proxy."""
    port = free_port()
    scratch = tempfile.mkdtemp(prefix="ml", dir="/tmp")
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        resources={"mell_cpu": CPU_SLOTS, "mell_one": 1},
        object_store_memory=150 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="test",
        _temp_dir=scratch,
    )
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    # The default of 1 s dominates the start and end of each application.
    ray.serve._private.client.CLIENT_POLLING_INTERVAL_S = 0.05
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(os.environ["MELL_RAY_FAULTS"], ignore_errors=True)


def settings(
    *,
    replicas: tuple[int, int] = (2, 2),
    engine: dict[str, Any] | None = None,
    mell: dict[str, Any] | None = None,
    source: str = "builtin",
) -> dict[str, Any]:
    """Arguments of an application with the built-in model."""
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL_ID, "model_source": source},
                "accelerator_type": "CPU",
                "deployment_config": {
                    "autoscaling_config": {
                        "min_replicas": replicas[0],
                        "max_replicas": replicas[1],
                    }
                },
                "engine_kwargs": engine or {},
            }
        ],
        "mell": {"fleet": {"replica_lease_s": 120}, "ingress": {"drain_s": 0.5}, **(mell or {})},
    }


@pytest.fixture(scope="module")
def deploy(cluster: str) -> Iterator[Callable[..., App]]:
    """Run an application until the end of the module."""
    running: list[str] = []

    def run(name: str, **options: Any) -> App:
        serve.run(build_openai_app(settings(**options)), name=name, route_prefix=f"/{name}")
        if name not in running:
            running.append(name)
        return App(name, f"{cluster}/{name}")

    yield run
    for name in running:
        delete(name)


def delete(name: str) -> None:
    """End an application, and its replicas before their lease is over."""
    serve.delete(name)
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == f"mell.{name}":
            with suppress(ValueError):  # gone by now
                ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))


def wait_for(condition: Callable[[S], T], look: Callable[[], S], message: str) -> T:
    """The first true value of ``condition(look())``."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        seen = look()
        value = condition(seen)
        if value:
            return value
        assert time.monotonic() < deadline, f"{message}: {seen}"
        time.sleep(0.02)


def outlasting(attempt: Callable[[int], T | None], lengths: Sequence[int] = LENGTHS) -> T:
    """What ``attempt`` makes of a request of so many tokens; of a longer one where it gave None,
    because the request had ended before the test was done with it."""
    for length in lengths:
        found = attempt(length)
        if found is not None:
            return found
    raise AssertionError(f"a request of {lengths[-1]} tokens ends before anything can be done")
