"""What benchmarks between replicas need before they begin: Ray on this machine, and a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mell_ray.bench.random_llama import write_random_llama

OBJECT_STORE_BYTES = 512 << 20

OnPhase = Callable[[str], None]


@contextmanager
def random_model_on_local_ray(on_phase: OnPhase, **ray_options: Any) -> Iterator[Path]:
    """The directory of a random model of 50 million parameters, while a Ray of this process's own
    runs; both are gone afterwards. ``ray_options``: more for ``ray.init``."""
    import ray

    with tempfile.TemporaryDirectory(prefix="mell-bench-") as scratch:
        model = Path(scratch) / "model"
        on_phase("writing a random model of 50 million parameters")
        write_random_llama(model)
        start_ray(tempfile.mkdtemp(prefix="mb", dir="/tmp"), OBJECT_STORE_BYTES, **ray_options)
        try:
            yield model
        finally:
            ray.shutdown()


def start_ray(scratch: str, object_store_bytes: int, **ray_options: Any) -> None:
    """A Ray of this process's own, quiet, with its files in ``scratch``."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=scratch,
        **ray_options,
    )
