"""What replicas and the rest of an application ask Ray for."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.serving import build_openai_app
from mell_ray.serving.fleet import Fleet

GPU = {"num_gpus": 1}
CPU = {"resources": {"mell_cpu": 1}}


@pytest.mark.parametrize(
    ("accelerator_type", "offered", "required", "expected"),
    [
        (None, {}, False, ("cpu", {})),
        (None, {"GPU": 1}, False, ("cuda", GPU)),
        ("GPU", {}, False, ("cuda", GPU)),  # waits for a GPU that an autoscaler brings
        ("H100", {}, False, ("cuda", GPU | {"accelerator_type": "H100"})),
        ("CPU", {"GPU": 1}, False, ("cpu", {})),
        ("CPU", {"mell_cpu": 2}, False, ("cpu", CPU)),
        ("CPU", {}, True, ("cpu", CPU)),
    ],
)
def test_a_replica_asks_for(
    monkeypatch: pytest.MonkeyPatch,
    accelerator_type: str | None,
    offered: dict[str, float],
    required: bool,
    expected: tuple[str, dict[str, Any]],
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: offered)
    config = _config(accelerator_type, {"fleet": {"require_cpu_resource": required}})
    (llm,) = config.llm_configs
    assert Fleet({}, config.mell, "space")._resources(llm) == expected


def test_new_replicas_keep_off_nodes_that_are_left() -> None:
    fleet = Fleet({}, _config("CPU", {}).mell, "space")
    assert fleet._elsewhere() == {}
    fleet.avoided = frozenset({"b" * 56, "a" * 56})
    selector = {"ray.io/node-id": f"!in({'a' * 56}, {'b' * 56})"}
    assert fleet._elsewhere() == {"label_selector": selector}


@pytest.mark.parametrize(
    ("resource", "expected"),
    [(None, {"num_cpus": 0}), ("head", {"num_cpus": 0, "resources": {"head": 0.001}})],
)
def test_router_migrator_and_ingress_stay_where_the_control_resource_is(
    resource: str | None, expected: dict[str, Any]
) -> None:
    ingress = build_openai_app(_config("CPU", {"control_resource": resource}))._bound_deployment
    (_, router_app) = ingress.init_args
    router = router_app._bound_deployment
    (migrator,) = router._deployment_config.deployment_actors
    for options in (ingress.ray_actor_options, router.ray_actor_options, migrator.actor_options):
        assert {key: options[key] for key in expected} == expected
        assert ("resources" in options) is (resource is not None)


def _config(accelerator_type: str | None, mell: dict[str, Any]) -> MellConfig:
    llm = LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": "m", "model_source": "builtin"},
            "accelerator_type": accelerator_type,
        }
    )
    return MellConfig.parse({"llm_configs": [llm.model_dump()], "mell": mell})
