"""From the application's settings to the scheduler's."""

from __future__ import annotations

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.errors import ConfigError
from mell_ray.scheduler import CostConfig, ModelLimits, SchedulerConfig


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
            tokens_per_unit=_block_size(config),
            spare_gpus=settings.fleet.spare_gpus,
            forecast=settings.fleet.forecast,
            idle_grace_s=settings.fleet.idle_grace_s,
            max_asleep=settings.fleet.max_asleep if settings.fleet.sleep else 0,
            turn_s=settings.fleet.turn_s,
            migration_enabled=settings.migration.enabled,
            max_migrations_in_flight=settings.migration.max_concurrent,
            migration_mode=settings.migration.mode,
            migration_price=_price_per_block(config),
            cost=CostConfig(
                link_bytes_per_s=1e9 * settings.migration.link_gb_per_s,
                prefill_tokens_per_s=settings.migration.prefill_tokens_per_s,
                hybrid=True,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"mell: {error}") from error


def _limits(llm: LLMConfig) -> ModelLimits:
    scaling = llm.deployment_config.autoscaling_config
    target_ms = llm.deployment_config.tpot_target_ms
    return ModelLimits(
        min_gpus=scaling.min_replicas,
        max_gpus=scaling.max_replicas,
        tpot_limit_s=None if target_ms is None else target_ms / 1e3,
    )


def _block_size(config: MellConfig) -> int:
    return max(llm.engine_kwargs.block_size for llm in config.llm_configs)


def _price_per_block(config: MellConfig) -> float | None:
    price_s = config.mell.migration.price_s
    return None if price_s is None else price_s * _block_size(config)
