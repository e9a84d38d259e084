"""The other side of ``ab_gpu_hours.py``: the same engine and the same API as a plain Ray Serve
deployment.

Each replica answers HTTP and holds an engine of its own. Serve spreads requests over replicas and
opens and stops these by its own autoscaling (``target_ongoing_requests`` with its delays); nothing
moves between them, and a replica that is stopped lets its streams end. No Router, no fleet, no
migration of mell-ray takes part.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.engine import Engine
from mell_ray.engine.loop import EngineLoop
from mell_ray.engine.types import RequestState, StepOutput, TokenDelta
from mell_ray.serving import ingress
from mell_ray.serving.guard import Guard
from mell_ray.serving.loading import loading_turn
from mell_ray.serving.model_source import build_engine
from mell_ray.serving.page import PageData
from mell_ray.serving.runner import Job
from mell_ray.serving.service import Service
from mell_ray.serving.track import Accepted

NAME = "Replica"
STREAM_END_S = 600.0  # how long a replica that is stopped lets its streams go on


class OwnEngine:
    """Runs jobs on the engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Queue[TokenDelta]] = {}
        self._loop = EngineLoop(engine, self._on_step, lambda: None)
        self._loop.start()

    async def run(self, job: Job) -> AsyncGenerator[Accepted, None]:
        """As ``mell_ray.serving.runner.Runner.run``."""
        state = RequestState(
            request_id=job.request_id,
            prompt_token_ids=job.prompt_token_ids,
            sampling=job.sampling,
            arrival_s=time.time(),
            generation=1,
        )
        queue = self._waiting[job.request_id] = asyncio.Queue()
        reason = None
        try:
            await asyncio.wrap_future(self._loop.call(lambda engine: engine.add(state)))
            while reason is None:
                delta = await queue.get()
                reason = delta.finish_reason
                yield Accepted(delta.token_ids, delta.logprobs, reason, delta.error)
        finally:
            del self._waiting[job.request_id]
            if reason is None:
                self._loop.call(lambda engine: engine.abort(job.request_id))

    def _on_step(self, output: StepOutput) -> None:
        self._asyncio.call_soon_threadsafe(self._deliver, output.deltas)

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            queue = self._waiting.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)


class ServeState:
    """Answers what the routes ask a Router for."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name

    async def call(self, method: str, *args: Any) -> Any:
        """Only the replicas' states; nothing else is asked."""
        assert method == "state", (method, args)
        status = await asyncio.to_thread(serve.status)
        states = status.applications[self._app_name].deployments[NAME].replica_states
        names = [str(state).lower() for state, count in states.items() for _ in range(count)]
        known = {"running": "ready"}
        replicas = [{"id": str(i), "state": known.get(n, n)} for i, n in enumerate(names)]
        return {"replicas": replicas, "requests": [], "queued": []}


class NoLimits:
    async def check(self, job: Job) -> None:
        """The engine refuses what it cannot hold."""


class Replica(ingress.Ingress):
    """Engine and API in one process."""

    async def __init__(self, config: MellConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        (llm,) = config.llm_configs
        self.guard = Guard(config.mell.auth, config.mell.ingress)
        self._router = ServeState(serve.get_replica_context().app_name)  # type: ignore[assignment]
        self._page_data = PageData(self._router)
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(None, _engine, llm)
        model = await loop.run_in_executor(None, ingress._served_model, llm)
        self._default_model = model.model_id
        limit = config.mell.ingress.default_max_tokens
        self._service = Service([model], OwnEngine(engine), NoLimits(), limit)


def _engine(llm: LLMConfig) -> Engine:
    with loading_turn():
        return build_engine(llm, "cpu", share_weights=True)  # both as mell-ray on a CPU


HttpReplica = serve.ingress(ingress.app)(Replica)


def build(args: dict[str, Any]) -> Application:
    """``llm_configs`` as for ``mell_ray.serving:build_openai_app``, with one model; ``autoscaling``
    is Serve's own ``autoscaling_config``."""
    autoscaling = args["autoscaling"]
    config = MellConfig.parse({"llm_configs": args["llm_configs"]})
    (llm,) = config.llm_configs
    return serve.deployment(
        HttpReplica,
        name=NAME,
        autoscaling_config=autoscaling,
        max_ongoing_requests=1000,  # the engine itself queues what it has no room for
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=STREAM_END_S,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {config.mell.fleet.cpu_resource: 1},
            "runtime_env": {
                "env_vars": {"OMP_NUM_THREADS": str(llm.engine_kwargs.num_threads)},
            },
        },
    ).bind(config)
