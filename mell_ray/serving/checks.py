"""What can be found wrong in a configuration before anything starts."""

from __future__ import annotations

from mell_ray.config import MellConfig
from mell_ray.errors import ConfigError
from mell_ray.scheduler import policy_names
from mell_ray.serving.model_source import resolve_source


def check_config(config: MellConfig) -> None:
    """Raises ConfigError, naming the setting."""
    for llm in config.llm_configs:
        resolve_source(llm)
    known = policy_names()
    if config.mell.policy.name not in known:
        raise ConfigError(
            f"mell.policy.name: {config.mell.policy.name!r} is not a policy; "
            f"choose one of {', '.join(known)}"
        )
