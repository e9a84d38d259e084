"""An application of mell-ray that is served on this machine while a load test runs."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from mell_ray.serving import build_openai_app

OBJECT_STORE_BYTES = 200 << 20


@contextmanager
def served(
    settings: dict[str, Any], name: str, *, replicas: int, scratch: Path, **serve_options: Any
) -> Iterator[str]:
    """Its URL, while a Ray of this process's own runs with room for so many CPU replicas and its
    files in ``scratch``; all of it is gone afterwards. ``serve_options``: more for
    ``serve.start``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        resources={"mell_cpu": replicas},
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(scratch),
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, **serve_options)
        serve.run(build_openai_app(settings), name=name, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == f"mell.{name}":
                ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
