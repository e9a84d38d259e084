"""Builds the Serve application from its configuration."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, DeploymentActorConfig

from mell_ray.config import MellConfig
from mell_ray.serving.checks import check_config
from mell_ray.serving.ingress import HttpIngress
from mell_ray.serving.migrator import Migrator
from mell_ray.serving.moves import MIGRATOR
from mell_ray.serving.router import Router

# A streaming or queued request holds a slot of its deployment for its whole life.
ROUTER_ONGOING_REQUESTS = 100_000
CONTROL_SHARE = 0.001  # of the control resource, an actor; it only says where actors may be


def build_openai_app(args: dict[str, Any] | MellConfig) -> Application:
    """An OpenAI-compatible application that packs and migrates requests.

    ``args`` has the shape of ``ray.serve.llm.build_openai_app``'s (``llm_configs``) plus a
    ``mell`` section; see ``mell_ray.config.MellConfig``.

    Raises:
        ConfigError: a setting is wrong; names it. Nothing has been started.
    """
    config = MellConfig.parse(args)
    check_config(config)
    return application(config)


def application(config: MellConfig, router_class: type[Router] = Router) -> Application:
    """The same, of a checked configuration and any kind of Router."""
    options = _control_options(config.mell.control_resource)
    router = serve.deployment(
        router_class,
        name="Router",
        num_replicas=1,
        max_ongoing_requests=ROUTER_ONGOING_REQUESTS,
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1,
        ray_actor_options=options,
        logging_config={"enable_access_log": False},  # a line for each placement and each poll
        deployment_actors=[
            DeploymentActorConfig(
                name=MIGRATOR,
                actor_class=ray.remote(Migrator),
                init_kwargs={"settings": config.mell.model_dump()},
                actor_options=options,
            )
        ],
    )
    ingress = serve.deployment(
        HttpIngress,
        name="Ingress",
        num_replicas=config.mell.ingress.num_replicas,
        max_ongoing_requests=config.mell.ingress.max_ongoing_requests,
        # What waits for a slot of an ingress, before anything of ours has seen it. Serve counts
        # what has only just arrived, too, so a burst must fit.
        max_queued_requests=config.mell.ingress.max_ongoing_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.mell.ingress.drain_s,
        ray_actor_options=options,
    )
    return ingress.bind(config, router.bind(config))


def _control_options(resource: str | None) -> dict[str, Any]:
    """Ray options of the actors that hold no accelerator."""
    options: dict[str, Any] = {"num_cpus": 0}
    if resource is not None:
        options["resources"] = {resource: CONTROL_SHARE}
    return options
