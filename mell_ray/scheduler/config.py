"""What a scheduler is told once, at its start. Sizes are in the driver's unit (see ``events``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mell_ray.scheduler.cost import CostConfig


@dataclass(frozen=True)
class ModelLimits:
    """The fleet of one model."""

    min_gpus: int = 1
    max_gpus: int = 1
    capacity: int | None = None  # expected of a GPU that is still to come; None: not known
    tpot_limit_s: float | None = None  # a GPU is full when its predicted step takes that long

    def __post_init__(self) -> None:
        if not 0 <= self.min_gpus <= self.max_gpus:
            raise ValueError(
                f"min_gpus ({self.min_gpus}) must lie between 0 and max_gpus ({self.max_gpus})"
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of one scheduler.

    ``growth_per_tick`` is what one running request may grow until the next report or planning
    tick, whichever comes first; that much is kept free for each, so that growth never meets a full
    GPU by surprise.
    """

    models: Mapping[str, ModelLimits]
    policy: str = "tide"
    params: Mapping[str, Any] = field(default_factory=dict)  # the policy's own settings
    growth_per_tick: int = 1
    tokens_per_unit: int = 16  # 16: sizes are blocks; 1: sizes are tokens
    units_per_prefix_block: int = 1  # size of what one hash of a request's prefix stands for
    spare_gpus: int = 0  # empty GPUs kept ready, per model
    idle_grace_s: float = 10.0  # how long a superfluous empty GPU stays
    startup_s: float = 0.0  # expected; learnt from GPUs that come
    max_asleep: int = 0  # superfluous GPUs that sleep rather than end, per model
    turn_s: float = 5.0  # how long a model keeps GPUs that others wait for and it has a use for
    forecast: bool = False  # keep GPUs ready ahead of demand, as ``forecast`` finds
    forecast_shortage: float = 0.005  # share of demand that may wait for a GPU to start
    migration_enabled: bool = True
    max_migrations_in_flight: int = 1 << 30
    migration_mode: str = "auto"  # "auto", or always "kv", "token" or "hybrid"
    migration_price: float | None = None  # GPU-seconds per moved unit; None: from ``cost``
    cost: CostConfig = field(default_factory=CostConfig)

    def __post_init__(self) -> None:
        if self.growth_per_tick < 0:
            raise ValueError(f"growth_per_tick must be at least 0, not {self.growth_per_tick}")
        if self.tokens_per_unit < 1:
            raise ValueError(f"tokens_per_unit must be at least 1, not {self.tokens_per_unit}")
        if self.migration_mode not in ("auto", "kv", "token", "hybrid"):
            raise ValueError(
                "migration_mode must be 'auto', 'kv', 'token' or 'hybrid', not "
                f"{self.migration_mode!r}"
            )
