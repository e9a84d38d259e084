"""The ingress' routes over a real engine in one process: HTTP, validation and generation, no Ray.

What Ray adds stands in here: the replica's context, the Router, and the way to a GPU replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, serve
from ray.serve._private.http_util import make_fastapi_class_based_view

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.engine import Engine
from mell_ray.engine.types import RequestState, TokenDelta
from mell_ray.errors import ConflictError, NotFoundError
from mell_ray.serving import ingress as module
from mell_ray.serving.guard import Guard
from mell_ray.serving.model_source import build_engine
from mell_ray.serving.page import PageData
from mell_ray.serving.runner import Job
from mell_ray.serving.service import Service
from mell_ray.serving.track import Accepted


class Router:
    """Answers like a Router whose one replica serves one model."""

    replica = "replica-1"

    def __init__(self, model_id: str) -> None:
        self._model_id = model_id

    async def call(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def ping(self) -> None:
        return None

    def limits(self, model_id: str) -> tuple[int, int]:
        assert model_id == self._model_id
        return 4096, 4096

    def state(self) -> dict[str, Any]:
        return {"replicas": [], "requests": [], "queued": []}

    def migrations(self) -> dict[str, Any]:
        return {"migrations": []}

    def page_data(self) -> bytes:
        return b"{}"

    def migrate(self, request_id: str, *where_and_how: str | None) -> Any:
        assert len(where_and_how) == 2
        raise NotFoundError(f"request {request_id!r} is not running", param="id")

    def evacuate(self, replica_id: str) -> dict[str, Any]:
        return self._replica(replica_id)

    def cordon(self, replica_id: str, cordoned: bool) -> dict[str, Any]:
        return self._replica(replica_id) | {"cordoned": cordoned}

    def drain_node(self, node: str, drained: bool) -> Any:
        del drained
        raise NotFoundError(f"node {node!r} is not in the cluster", param="id")

    def open_replica(self, model: str | None) -> Any:
        if model not in (None, self._model_id):
            raise NotFoundError(f"model {model!r} is not served here", param="model")
        raise ConflictError(f"model {self._model_id!r} has its max_replicas (1) already")

    def _replica(self, replica_id: str) -> dict[str, Any]:
        if replica_id != self.replica:
            raise NotFoundError(f"replica {replica_id!r} does not exist", param="id")
        return {"id": replica_id}


class InProcessRuns:
    """Runs jobs on the engine, as a Runner does with one replica. Who waits for tokens steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._arrived: dict[str, list[TokenDelta]] = {}

    async def run(self, job: Job) -> AsyncGenerator[Accepted, None]:
        state = RequestState(
            request_id=job.request_id,
            prompt_token_ids=job.prompt_token_ids,
            sampling=job.sampling,
            priority=job.priority,
            generation=1,
        )
        self._engine.add(state)
        arrived = self._arrived[job.request_id] = []
        try:
            reason = None
            while reason is None:
                if not arrived:
                    for delta in self._engine.step().deltas:
                        if delta.request_id in self._arrived:
                            self._arrived[delta.request_id].append(delta)
                while arrived and reason is None:
                    delta = arrived.pop(0)
                    reason = delta.finish_reason
                    yield Accepted(delta.token_ids, delta.logprobs, reason, delta.error)
                await asyncio.sleep(0)
        finally:
            del self._arrived[job.request_id]
            self._engine.abort(job.request_id)


class WithRequestId:
    """Serve gives each request an id before the application sees it."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._count = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self._count += 1
            headers = [(k, v) for k, v in scope["headers"] if k != b"x-request-id"]
            headers.append((b"x-request-id", b"request-%d" % self._count))
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def make_api(patch: pytest.MonkeyPatch, args: dict[str, Any]) -> WithRequestId:
    """An ASGI application of ``args``, whose first model runs on a CPU."""
    config = MellConfig.parse(args)
    llm: LLMConfig = config.llm_configs[0]
    ingress = module.Ingress.__new__(module.Ingress)
    router = Router(llm.model_id)
    ingress.guard = Guard(config.mell.auth, config.mell.ingress)
    ingress.allowed_origins = config.mell.ingress.allowed_origins
    ingress._router = router  # type: ignore[assignment]
    ingress._default_model = llm.model_id
    ingress._page_data = PageData(router)  # type: ignore[arg-type]
    ingress._service = Service(
        [module._served_model(llm)],
        InProcessRuns(build_engine(llm, "cpu", share_weights=False)),
        module._PoolLimits(router),  # type: ignore[arg-type]
        config.mell.ingress.default_max_tokens,
    )
    context = SimpleNamespace(servable_object=ingress)
    patch.setattr(serve, "get_replica_context", lambda: context)
    # As Serve does with a replica's application.
    app = cloudpickle.loads(cloudpickle.dumps(module.app))
    make_fastapi_class_based_view(app, module.Ingress)
    return WithRequestId(app)
