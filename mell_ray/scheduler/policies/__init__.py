"""Placement and migration policies, by name."""

from __future__ import annotations

from mell_ray.errors import ConfigError
from mell_ray.scheduler.policies.base import Context, Policy
from mell_ray.scheduler.policies.best_fit import BestFit
from mell_ray.scheduler.policies.first_fit import FirstFit
from mell_ray.scheduler.policies.llumnix import Llumnix
from mell_ray.scheduler.policies.mell import Mell
from mell_ray.scheduler.policies.tide import Tide
from mell_ray.scheduler.policies.worst_fit import WorstFit

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Tide, Mell, BestFit, FirstFit, WorstFit, Llumnix)
}


def policy_names() -> list[str]:
    return list(POLICIES)


def find_policy(name: str) -> type[Policy]:
    """Raises:
    ConfigError: there is no such policy; the message lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}; there are: {', '.join(POLICIES)}")
    return POLICIES[name]


__all__ = ["POLICIES", "Context", "Policy", "find_policy", "policy_names"]
