"""From the application's settings to the scheduler's."""

from __future__ import annotations

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.errors import ConfigError
from mell_ray.scheduler import ModelLimits, SchedulerConfig


def scheduler_config(config: MellConfig) -> SchedulerConfig:
    """The scheduler's settings; sizes are KV blocks.

    Raises:
        ConfigError: the policy refuses its parameters.
    """
    settings = config.mell
    try:
        return SchedulerConfig(
            models={llm.model_id: _limits(llm) for llm in config.llm_configs},
            policy=settings.policy.name,
            params=settings.policy.params,
            growth_per_tick=1,
            tokens_per_unit=max(llm.engine_kwargs.block_size for llm in config.llm_configs),
            spare_gpus=settings.fleet.spare_gpus,
            idle_grace_s=settings.fleet.idle_grace_s,
            migration_enabled=settings.migration.enabled,
            max_migrations_in_flight=settings.migration.max_concurrent,
            migration_mode=settings.migration.mode,
        )
    except ValueError as error:
        raise ConfigError(f"mell: {error}") from error


def _limits(llm: LLMConfig) -> ModelLimits:
    scaling = llm.deployment_config.autoscaling_config
    return ModelLimits(min_gpus=scaling.min_replicas, max_gpus=scaling.max_replicas)
