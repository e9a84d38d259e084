"""Answers OpenAI requests with a Runner: validation, choices, text, responses. No HTTP, no Ray."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from pydantic import ValidationError

from mell_ray.errors import InvalidRequestError, ModelNotFoundError
from mell_ray.observability.tracing import Tracer
from mell_ray.observability.tracing import traceparent as traceparent_of
from mell_ray.openai.errors import from_validation_error
from mell_ray.openai.plan import (
    Generation,
    choice_request_id,
    plan_chat,
    plan_completion,
)
from mell_ray.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from mell_ray.openai.response import (
    SSE_DONE,
    ChatChunker,
    Choice,
    CompletionChunker,
    chat_response,
    completion_response,
    model_card,
    usage,
)
from mell_ray.openai.structured import SCHEMA_PARAM, GrammarCheck
from mell_ray.serving.choices import Runs, choice_events
from mell_ray.serving.prepared import Prepared, ServedModel
from mell_ray.serving.runner import Job
from mell_ray.serving.wire import Share

LONG_PROMPT_CHARACTERS = 10_000


class Limits(Protocol):
    """Refuses a job that no replica of its model can hold."""

    async def check(self, job: Job) -> None: ...


class Service:
    """All models of one ingress."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        runs: Runs,
        limits: Limits,
        default_max_tokens: int,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._models = {model.model_id: model for model in models}
        self._grammars = {
            model.model_id: GrammarCheck(model.tokenizer, model.end_token_ids) for model in models
        }
        self._runs = runs
        self._limits = limits
        self._default_max_tokens = default_max_tokens

    def model_cards(self) -> list[dict[str, Any]]:
        return [self.model_card(name) for name in self._models]

    def model_card(self, name: str) -> dict[str, Any]:
        model = self._model(name)
        return model_card(model.model_id, model.created, model.max_model_len)

    async def prepare(
        self,
        body: Any,
        *,
        chat: bool,
        request_id: str | None = None,
        wants_trace: bool = False,
        traceparent: str = "",
        priority: int | None = None,
        share: Share | None = None,
    ) -> Prepared:
        """Validate a request body and tokenise it. Without ``request_id`` it gets a new one.
        ``traceparent``: the client's own trace, if it has one. ``priority``: in place of the
        body's. ``share``: see ``Job``.

        Raises:
            InvalidRequestError: names the field.
            ModelNotFoundError: the model is not served here.
        """
        request = _parse(body, chat=chat)
        model = self._model(request.model)
        # A tokenizer takes its time over a long prompt; running streams must not wait for it.
        if _num_characters(request) > LONG_PROMPT_CHARACTERS:
            generations = await asyncio.to_thread(self._plan, request, model)
        else:
            generations = self._plan(request, model)
        grammar = generations[0].sampling.grammar
        if grammar is not None:
            tools = generations[0].tools
            param = tools.param if tools is not None else SCHEMA_PARAM
            await self._grammars[model.model_id].check(grammar, param)
        request_id = request_id or uuid.uuid4().hex
        span, above = self._begin_span(request, request_id, traceparent)
        jobs = [
            Job(
                request_id=choice_request_id(request_id, i, len(generations)),
                model_id=model.model_id,
                prompt_token_ids=generation.prompt_token_ids,
                sampling=generation.sampling,
                priority=request.priority if priority is None else priority,
                traceparent=above,
                share=share,
            )
            for i, generation in enumerate(generations)
        ]
        for job in jobs:
            await self._limits.check(job)
        created = int(time.time())
        return Prepared(request_id, created, model, request, generations, jobs, wants_trace, span)

    def _begin_span(
        self, request: GenerationRequest, request_id: str, parent: str
    ) -> tuple[Any, str]:
        """The span of the whole request, and its traceparent."""
        if self._tracer is None:
            return None, ""
        name = "chat" if isinstance(request, ChatCompletionRequest) else "completion"
        attributes = {
            "mell.request_id": request_id,
            "gen_ai.operation.name": name,
            "gen_ai.request.model": request.model,
        }
        span = self._tracer.start(name, parent, attributes)
        return span, traceparent_of(span)

    def _plan(self, request: GenerationRequest, model: ServedModel) -> list[Generation]:
        limits: dict[str, Any] = {
            "max_model_len": model.max_model_len,
            "default_max_tokens": self._default_max_tokens,
            "request_seed": secrets.randbits(62),
            "sampling": model.sampling,
        }
        if isinstance(request, ChatCompletionRequest):
            return plan_chat(request, model.tokenizer, **limits, tool_format=model.tool_format)
        assert isinstance(request, CompletionRequest)
        return plan_completion(request, model.tokenizer, **limits)

    async def respond(
        self, prepared: Prepared, started: asyncio.Event | None = None
    ) -> dict[str, Any]:
        """The whole answer at once. ``started`` is set when the first token is there."""
        wants_logprobs = prepared.request.num_logprobs is not None
        choices = [
            Choice(generation.choice_index, echo=generation.echo, logprobs=wants_logprobs)
            for generation in prepared.generations
        ]
        async with aclosing(choice_events(self._runs, prepared)) as events:
            async for event in events:
                choices[event.index].add(event.piece)
                for call in event.calls:
                    choices[event.index].add_call(call)
                choices[event.index].finish_reason = event.reason
                if started is not None:
                    started.set()
        build = (
            chat_response
            if isinstance(prepared.request, ChatCompletionRequest)
            else completion_response
        )
        body = build(
            prepared.response_id,
            prepared.created,
            prepared.model.model_id,
            choices,
            prepared.prompt_tokens,
        )
        if prepared.wants_trace:
            body["mell_trace"] = prepared.trace()
        return body

    async def stream(self, prepared: Prepared) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        request = prepared.request
        is_chat = isinstance(request, ChatCompletionRequest)
        chunker = (ChatChunker if is_chat else CompletionChunker)(
            prepared.response_id,
            prepared.created,
            prepared.model.model_id,
            include_usage=request.include_usage,
        )
        completion_tokens = 0
        async with aclosing(choice_events(self._runs, prepared)) as events:
            greeted = False
            async for event in events:
                head = b""
                if not greeted:
                    head, greeted = _greeting(chunker, prepared), True
                completion_tokens += len(event.piece.token_ids)
                chunk = head + chunker.delta(event.index, event.piece)
                if isinstance(chunker, ChatChunker):
                    chunk += b"".join(chunker.call(event.index, call) for call in event.calls)
                if event.reason is not None:
                    chunk += chunker.finish(event.index, event.reason)
                if chunk:
                    yield chunk
        tail = SSE_DONE
        if prepared.wants_trace:
            tail = chunker.extra("mell_trace", prepared.trace()) + tail
        if request.include_usage:
            tail = chunker.usage(prepared.prompt_tokens, completion_tokens) + tail
        yield tail

    def _model(self, name: str) -> ServedModel:
        model = self._models.get(name)
        if model is None:
            served = ", ".join(repr(known) for known in self._models)
            raise ModelNotFoundError(
                f"The model '{name}' does not exist; this server has {served}.",
                param="model",
                code="model_not_found",
            )
        return model

    async def generate(self, prepared: Prepared) -> AsyncGenerator[dict[str, Any], None]:
        """Plain events for Python callers: text and tokens of choice 0 as they come."""
        async with aclosing(choice_events(self._runs, prepared)) as events:
            async for event in events:
                yield {
                    "index": event.index,
                    "text": event.piece.text,
                    "token_ids": list(event.piece.token_ids),
                    "finish_reason": event.reason,
                }

    async def generate_all(self, prepared: Prepared) -> dict[str, Any]:
        """The same, collected."""
        texts = ["" for _ in prepared.jobs]
        token_ids: list[list[int]] = [[] for _ in prepared.jobs]
        reasons: list[str | None] = [None for _ in prepared.jobs]
        async with aclosing(self.generate(prepared)) as events:
            async for event in events:
                texts[event["index"]] += event["text"]
                token_ids[event["index"]] += event["token_ids"]
                reasons[event["index"]] = event["finish_reason"]
        return {
            "id": prepared.request_id,
            "model": prepared.model.model_id,
            "choices": [
                {"index": i, "text": texts[i], "token_ids": token_ids[i], "finish_reason": reason}
                for i, reason in enumerate(reasons)
            ],
            "usage": usage(prepared.prompt_tokens, sum(map(len, token_ids))),
        }


def _parse(body: Any, *, chat: bool) -> GenerationRequest:
    if not isinstance(body, Mapping):
        raise InvalidRequestError("the request body must be a JSON object")
    try:
        return (ChatCompletionRequest if chat else CompletionRequest).model_validate(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


def _num_characters(request: GenerationRequest) -> int:
    if isinstance(request, ChatCompletionRequest):
        return sum(len(message.content) for message in request.messages)
    assert isinstance(request, CompletionRequest)
    return sum(len(prompt) for prompt in request.prompt)


def _greeting(chunker: ChatChunker | CompletionChunker, prepared: Prepared) -> bytes:
    """What a stream begins with: the role of each choice, or the echoed prompt."""
    if isinstance(chunker, ChatChunker):
        return b"".join(chunker.role(i) for i in range(len(prepared.jobs)))
    return b"".join(
        chunker.echo(generation.choice_index, generation.echo)
        for generation in prepared.generations
        if generation.echo
    )
