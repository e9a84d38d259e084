"""What can be found wrong in a configuration before anything starts."""

from __future__ import annotations

from mell_ray.config import MellConfig
from mell_ray.errors import ConfigError
from mell_ray.observability.tracing import check_tracing
from mell_ray.scheduler import Scheduler
from mell_ray.serving.guard import Guard
from mell_ray.serving.model_source import check_directory
from mell_ray.serving.scheduling import scheduler_config


def check_config(config: MellConfig) -> None:
    """Raises ConfigError, naming the setting: model sources and context lengths, API keys, the
    policy and its parameters, the exporter of traces."""
    for llm in config.llm_configs:
        check_directory(llm)
    Guard(config.mell.auth, config.mell.ingress)
    check_tracing(config.mell.observability.tracing)
    try:
        Scheduler(scheduler_config(config))
    except ConfigError as error:
        raise ConfigError(f"mell.policy: {error}") from None
