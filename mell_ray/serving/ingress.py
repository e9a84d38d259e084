"""The ingress: HTTP and Python handle calls in, tokens out. Stateless, any number of replicas."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from mell_ray.config import LLMConfig, MellConfig
from mell_ray.errors import InvalidRequestError, MellError, NotFoundError, OverloadedError
from mell_ray.observability.recorder import RayRecorder
from mell_ray.observability.tracing import TRACEPARENT, make_tracer
from mell_ray.openai.errors import error_body, error_headers
from mell_ray.openai.limits import MAX_INT32
from mell_ray.openai.response import model_list
from mell_ray.openai.tool_formats import find_format
from mell_ray.serving.event_stream import EventStream
from mell_ray.serving.fleet import replica_namespace
from mell_ray.serving.guard import SHARE, Guard, GuardMiddleware
from mell_ray.serving.heap import keep_trimmed
from mell_ray.serving.http_body import flag, json_body, json_object, refuse_unknown
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.model_source import (
    context_length,
    load_tokenizer,
    model_end_token_ids,
    sampling_defaults,
)
from mell_ray.serving.openapi import Api, fields, generation, route
from mell_ray.serving.page import HEADERS, PageData, status_page
from mell_ray.serving.prefix import cacheable_block_size
from mell_ray.serving.prepared import Prepared, ServedModel
from mell_ray.serving.router_client import RouterClient
from mell_ray.serving.runner import Job, Runner, check_fits
from mell_ray.serving.service import Service

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}")
PATIENCE_S = 1.0
BEHIND_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"

app = Api(title="mell-ray", docs_url="/docs", redoc_url=None)
app.add_middleware(GuardMiddleware)


@app.exception_handler(MellError)
async def _mell_error(_: Request, error: MellError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status_code, error_headers(error))


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path}; /docs lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}"
    body = error_body(NotFoundError(message, code=str(error.status_code)))
    return JSONResponse(body, error.status_code, error.headers)


@app.exception_handler(Exception)
async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    logger.error("request failed", exc_info=error)
    return JSONResponse(error_body(error), 500)


class _PoolLimits:
    """The pool size of each model's replicas, asked once from the Router."""

    def __init__(self, router: RouterClient) -> None:
        self._router = router
        self._known: dict[str, tuple[int, int]] = {}

    async def check(self, job: Job) -> None:
        limits = self._known.get(job.model_id)
        if limits is None:
            limits = await self._router.call("limits", job.model_id)
            if limits is not None:
                self._known[job.model_id] = limits
        check_fits(job, limits)


class Ingress:
    """See the module. Python callers use ``chat``, ``completions`` and ``generate``."""

    async def __init__(self, config: MellConfig, router: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging(config.mell.log_level)
        keep_trimmed()
        self.guard = Guard(config.mell.auth, config.mell.ingress)
        self.allowed_origins = config.mell.ingress.allowed_origins
        namespace = replica_namespace(config.mell, serve.get_replica_context().app_name)
        self._router = RouterClient(router)
        names = [llm.model_id for llm in config.llm_configs]
        recorder = RayRecorder("ingress")
        tracer = make_tracer(config.mell.observability.tracing, "ingress")
        for name in names:
            recorder.start_from_zero(name)
        blocks = {llm.model_id: cacheable_block_size(llm) for llm in config.llm_configs}
        self._runner = Runner(namespace, uuid.uuid4().hex, self._router, blocks, recorder, tracer)
        loop = asyncio.get_running_loop()
        models = [
            await loop.run_in_executor(None, _served_model, llm) for llm in config.llm_configs
        ]
        self._page_data = PageData(self._router)
        self._default_model = models[0].model_id
        self._service = Service(
            models,
            self._runner,
            _PoolLimits(self._router),
            config.mell.ingress.default_max_tokens,
            tracer,
        )

    # --- OpenAI ----------------------------------------------------------------------------

    @app.get("/v1/models", **route())
    async def list_models(self) -> Response:
        return JSONResponse(model_list(self._service.model_cards()))

    @app.get("/v1/models/{model_id:path}", **route(404))
    async def get_model(self, model_id: str) -> Response:
        return JSONResponse(self._service.model_card(model_id))

    @app.post("/v1/chat/completions", **generation("ChatCompletionRequest"))
    async def chat_completions(self, request: Request) -> Response:
        return await self._http(request, chat=True)

    @app.post("/v1/completions", **generation("CompletionRequest"))
    async def text_completions(self, request: Request) -> Response:
        return await self._http(request, chat=False)

    @app.get("/health", **route(needs_key=False))
    async def health(self) -> Response:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._router.call("ping")
        except (TimeoutError, MellError):
            raise OverloadedError("the Router does not answer", retry_after_s=1) from None
        return JSONResponse({"status": "ok"})

    # --- operator --------------------------------------------------------------------------

    @app.get("/mell/v1/state", **route())
    async def state(self) -> Response:
        return JSONResponse(await self._router.call("state"))

    @app.get("/mell", **route(content_type="text/html", answer={"type": "string"}, needs_key=False))
    async def status_page(self) -> Response:
        return HTMLResponse(status_page(), headers=HEADERS)

    @app.get("/mell/v1/live", **route())
    async def live(self) -> Response:
        data = await self._page_data.get()
        return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})

    @app.get("/mell/v1/migrations", **route())
    async def migrations(self) -> Response:
        return JSONResponse(await self._router.call("migrations"))

    @app.post(
        "/mell/v1/requests/{request_id}/migrate",
        **route(
            400,
            404,
            409,
            body=fields(to={"type": ["string", "null"]}, mode={"enum": ["auto", "kv", "token"]}),
        ),
    )
    async def migrate(self, request_id: str, request: Request) -> Response:
        body = await json_object(request)
        to, mode = body.get("to"), body.get("mode", "auto")
        refuse_unknown(body, {"to", "mode"})
        if to is not None and not isinstance(to, str):
            raise InvalidRequestError("'to': must be a replica id or null", param="to")
        if mode not in ("kv", "token", "hybrid", "auto"):
            raise InvalidRequestError(
                "'mode': must be 'kv', 'token', 'hybrid' or 'auto'", param="mode"
            )
        return JSONResponse(await self._router.call("migrate", request_id, to, mode))

    @app.post("/mell/v1/replicas/{replica_id}/evacuate", **route(404, 409, status=202))
    async def evacuate(self, replica_id: str) -> Response:
        return JSONResponse(await self._router.call("evacuate", replica_id), 202)

    @app.post(
        "/mell/v1/nodes/{node}/drain",
        **route(400, 404, 409, status=202, body=fields(drained={"type": "boolean"})),
    )
    async def drain_node(self, node: str, request: Request) -> Response:
        drained = flag(await json_object(request), "drained")
        return JSONResponse(await self._router.call("drain_node", node, drained), 202)

    @app.post(
        "/mell/v1/replicas/{replica_id}/cordon",
        **route(400, 404, 409, body=fields(cordoned={"type": "boolean"})),
    )
    async def cordon(self, replica_id: str, request: Request) -> Response:
        cordoned = flag(await json_object(request), "cordoned")
        return JSONResponse(await self._router.call("cordon", replica_id, cordoned))

    @app.post(
        "/mell/v1/replicas",
        **route(400, 404, 409, status=202, body=fields(model={"type": ["string", "null"]})),
    )
    async def open_replica(self, request: Request) -> Response:
        body = await json_object(request)
        refuse_unknown(body, {"model"})
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise InvalidRequestError("'model': must be a model id", param="model")
        return JSONResponse(await self._router.call("open_replica", model), 202)

    # --- Python handle ---------------------------------------------------------------------

    async def chat(self, body: dict[str, Any] | None = None, **fields: Any) -> Any:
        """``/v1/chat/completions`` for other Ray apps: the same body, as a dict or as keywords;
        ``model`` may be left out. Returns the response, or with ``stream=True`` (and
        ``handle.options(stream=True)``) a generator of chunks."""
        return await self._handle_call(body, fields, chat=True)

    async def completions(self, body: dict[str, Any] | None = None, **fields: Any) -> Any:
        """``/v1/completions``, see ``chat``."""
        return await self._handle_call(body, fields, chat=False)

    async def generate(self, prompt: str | list[int], **fields: Any) -> Any:
        """Tokens and text without OpenAI's wrapping: ``{"choices": [{"text", "token_ids",
        "finish_reason"}], "usage"}``; streamed: ``{"index", "text", "token_ids",
        "finish_reason"}`` per step. ``fields`` as in ``/v1/completions``."""
        body = {"model": self._default_model, "prompt": prompt, **fields}
        prepared = await self._service.prepare(body, chat=False, share=self.guard.share())
        if prepared.request.stream:
            return self._service.generate(prepared)
        return await self._service.generate_all(prepared)

    async def state_snapshot(self) -> dict[str, Any]:
        """``GET /mell/v1/state`` for Python callers."""
        return await self._router.call("state")

    async def _handle_call(
        self, body: dict[str, Any] | None, fields: dict[str, Any], *, chat: bool
    ) -> Any:
        merged = {"model": self._default_model, **(body or {}), **fields}
        prepared = await self._service.prepare(merged, chat=chat, share=self.guard.share())
        if prepared.request.stream:
            return _decoded(self._service.stream(prepared))
        return await self._service.respond(prepared)

    # --- HTTP ------------------------------------------------------------------------------

    async def _http(self, request: Request, *, chat: bool) -> Response:
        prepared = await self._service.prepare(
            await json_body(request),
            chat=chat,
            request_id=_request_id(request),
            wants_trace=_wants_trace(request),
            traceparent=request.headers.get(TRACEPARENT, ""),
            priority=_priority(request),
            share=request.scope.get(SHARE),
        )
        if prepared.request.stream:
            return await self._sse(prepared)
        return await self._whole(prepared)

    async def _sse(self, prepared: Prepared) -> Response:
        """A stream whose first chunk is there already: what fails before it gets its status."""
        chunks = self._service.stream(prepared)
        try:
            first = await anext(chunks)
        except BaseException:
            await chunks.aclose()
            raise
        return EventStream(first, chunks)

    async def _whole(self, prepared: Prepared) -> Response:
        """The answer in one piece. Serve cancels this call when the client goes away, but behind
        HAProxy it learns of that only when something is written: see ``_spaced``."""
        started = asyncio.Event()
        work = asyncio.create_task(self._service.respond(prepared, started))
        if not BEHIND_HAPROXY:
            return JSONResponse(await work)
        patience = asyncio.create_task(_after(started, PATIENCE_S))
        try:
            await asyncio.wait({work, patience}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return JSONResponse(work.result())
        except BaseException:
            work.cancel()
            raise
        finally:
            patience.cancel()
        return StreamingResponse(_spaced(work), media_type="application/json")


def _served_model(llm: LLMConfig) -> ServedModel:
    tokenizer = load_tokenizer(llm)
    return ServedModel(
        llm.model_id,
        tokenizer,
        context_length(llm),
        int(time.time()),
        model_end_token_ids(llm),
        find_format(llm.tool_call_format, tokenizer),
        sampling_defaults(llm),
    )


def _request_id(request: Request) -> str:
    """Serve gives each request an ``x-request-id``, the client's own if it sent one, and answers
    with it."""
    request_id = request.headers.get("x-request-id", "")
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(
            "'x-request-id': must be 1 to 128 letters, digits, or any of . _ : -",
            param="x-request-id",
        )
    return request_id


def _wants_trace(request: Request) -> bool:
    value = request.headers.get("x-mell-trace", "0")
    if value not in ("0", "1"):
        raise InvalidRequestError("'x-mell-trace': must be 0 or 1", param="x-mell-trace")
    return value == "1"


def _priority(request: Request) -> int | None:
    """The header's priority, in place of the body's."""
    value = request.headers.get("x-mell-priority")
    if value is None:
        return None
    if not _INTEGER.fullmatch(value) or abs(int(value)) > MAX_INT32:
        raise InvalidRequestError(
            f"'x-mell-priority': must be a whole number from -{MAX_INT32} to {MAX_INT32}",
            param="x-mell-priority",
        )
    return int(value)


async def _decoded(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[dict[str, Any], None]:
    """Server-sent events as dicts, for Python callers."""
    async with aclosing(chunks):
        async for chunk in chunks:
            for event in chunk.decode().split("\n\n"):
                data = event.removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)


async def _after(event: asyncio.Event, seconds: float) -> None:
    await event.wait()
    await asyncio.sleep(seconds)


async def _spaced(work: asyncio.Task[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The JSON that ``work`` gives, with blanks before it while it is not ready: legal in JSON,
    and the first that a client which has gone away does not take ends the request."""
    try:
        while not (await asyncio.wait({work}, timeout=PATIENCE_S))[0]:
            yield b" "
        yield json.dumps(work.result(), separators=(",", ":")).encode()
    finally:
        work.cancel()


# Wrapped here, at the end: Serve copies the app, and with it what its routes refer to, at once.
HttpIngress = serve.ingress(app)(Ingress)
