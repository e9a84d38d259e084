"""Where requests live: pure, no Ray, no torch. Live and in simulation the same."""

from mell_ray.scheduler.config import ModelLimits, SchedulerConfig
from mell_ray.scheduler.cost import CostConfig
from mell_ray.scheduler.policies import POLICIES, policy_names
from mell_ray.scheduler.scheduler import GpuView, Scheduler

__all__ = [
    "POLICIES",
    "CostConfig",
    "GpuView",
    "ModelLimits",
    "Scheduler",
    "SchedulerConfig",
    "policy_names",
]
