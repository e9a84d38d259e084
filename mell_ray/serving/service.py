"""Answers OpenAI requests with a Runner: validation, choices, text, responses. No HTTP, no Ray."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from mell_ray.errors import InvalidRequestError, ModelNotFoundError
from mell_ray.observability.tracing import Tracer
from mell_ray.observability.tracing import traceparent as traceparent_of
from mell_ray.openai.errors import from_validation_error
from mell_ray.openai.plan import (
    Generation,
    choice_request_id,
    count_prompt_tokens,
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
    ApiFinishReason,
    ChatChunker,
    Choice,
    CompletionChunker,
    chat_response,
    completion_response,
    finish_reason,
    model_card,
    usage,
)
from mell_ray.openai.structured import SCHEMA_PARAM, GrammarCheck
from mell_ray.openai.text import TextPiece
from mell_ray.openai.tokenizer import Tokenizer
from mell_ray.openai.tool_calls import CallDelta, ToolCallParser
from mell_ray.openai.tool_formats import ToolFormat
from mell_ray.serving.runner import Job
from mell_ray.serving.track import Accepted
from mell_ray.serving.wire import Share

LONG_PROMPT_CHARACTERS = 10_000


class Runs(Protocol):
    """What generates tokens: a Runner."""

    def run(self, job: Job) -> AsyncGenerator[Accepted, None]: ...


class Limits(Protocol):
    """Refuses a job that no replica of its model can hold."""

    async def check(self, job: Job) -> None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the ingress knows it."""

    model_id: str
    tokenizer: Tokenizer
    max_model_len: int
    created: int
    tool_format: ToolFormat | None = None  # None: it cannot call tools


@dataclass(slots=True)
class ChoiceEvent:
    """What one choice has to add; ``reason`` with its last event."""

    index: int
    piece: TextPiece
    reason: ApiFinishReason | None
    calls: Sequence[CallDelta] = ()  # found in the text, which then is not in ``piece``


@dataclass(frozen=True, slots=True)
class Prepared:
    """A validated request, ready to run."""

    request_id: str
    created: int
    model: ServedModel
    request: GenerationRequest
    generations: Sequence[Generation]
    jobs: Sequence[Job]
    wants_trace: bool = False
    span: Any = None  # OpenTelemetry's; None: not traced

    @property
    def response_id(self) -> str:
        """The ``id`` of the response body, with OpenAI's prefix."""
        prefix = "chatcmpl" if isinstance(self.request, ChatCompletionRequest) else "cmpl"
        return f"{prefix}-{self.request_id}"

    def trace(self) -> dict[str, Any]:
        """Where the time of each choice went, once all have ended."""
        return {
            "request_id": self.request_id,
            "choices": [
                {"index": generation.choice_index, **job.clock.breakdown()}
                for generation, job in zip(self.generations, self.jobs, strict=True)
            ],
        }

    @property
    def prompt_tokens(self) -> int:
        return count_prompt_tokens(self.generations)


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
        self._grammars = {model.model_id: GrammarCheck(model.tokenizer) for model in models}
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
        limits: dict[str, int] = {
            "max_model_len": model.max_model_len,
            "default_max_tokens": self._default_max_tokens,
            "request_seed": secrets.randbits(62),
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
        async with aclosing(self.events(prepared)) as events:
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
        async with aclosing(self.events(prepared)) as events:
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

    def events(self, prepared: Prepared) -> AsyncGenerator[ChoiceEvent, None]:
        """Events of all choices as they come; closing it drops what still runs."""
        several = len(prepared.jobs) > 1
        events = self._merged(prepared) if several else self._choice(prepared, 0)
        return events if prepared.span is None else self._traced(prepared, events)

    async def _traced(
        self, prepared: Prepared, events: AsyncGenerator[ChoiceEvent, None]
    ) -> AsyncGenerator[ChoiceEvent, None]:
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            prepared.span.end()

    async def _merged(self, prepared: Prepared) -> AsyncGenerator[ChoiceEvent, None]:
        """Events of several choices that run at once."""
        queue: asyncio.Queue[ChoiceEvent | BaseException | None] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._feed(prepared, i, queue)) for i in range(len(prepared.jobs))
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, ChoiceEvent):
                    yield item
                elif item is None:
                    running -= 1
                else:
                    raise item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(
        self,
        prepared: Prepared,
        index: int,
        queue: asyncio.Queue[ChoiceEvent | BaseException | None],
    ) -> None:
        try:
            async with aclosing(self._choice(prepared, index)) as events:
                async for event in events:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def _choice(self, prepared: Prepared, index: int) -> AsyncGenerator[ChoiceEvent, None]:
        """One choice from tokens to text; stops the request where a stop string is complete."""
        generation = prepared.generations[index]
        text = generation.open_text(prepared.model.tokenizer)
        tools = generation.open_tools(prepared.request_id)
        async with aclosing(self._runs.run(prepared.jobs[index])) as accepted:
            async for delta in accepted:
                piece = text.push(delta.token_ids, delta.logprobs)
                reason: ApiFinishReason | None = "stop" if piece.stopped else None
                if reason is None and delta.finish_reason is not None:
                    last = text.finish()
                    reason = "stop" if last.stopped else _reason(delta)
                    piece = _join(piece, last)
                event = ChoiceEvent(index, piece, reason)
                if tools is not None:
                    event = _with_calls(event, tools)
                yield event
                if event.reason is not None:
                    return

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
        async with aclosing(self.events(prepared)) as events:
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


def _reason(delta: Accepted) -> ApiFinishReason:
    assert delta.finish_reason is not None
    return finish_reason(delta.finish_reason, delta.error)


def _with_calls(event: ChoiceEvent, tools: ToolCallParser) -> ChoiceEvent:
    """Tell calls from text. What makes calls ends with them, unless it was cut."""
    parsed = tools.push(event.piece.text)
    content, calls = parsed.content, parsed.calls
    reason = "stop" if tools.complete and event.reason is None else event.reason
    if reason is not None:
        last = tools.finish()
        content, calls = content + last.content, calls + last.calls
    if reason == "stop" and tools.num_calls:
        reason = "tool_calls"
    return ChoiceEvent(event.index, replace(event.piece, text=content), reason, calls)


def _join(first: TextPiece, second: TextPiece) -> TextPiece:
    return TextPiece(
        first.text + second.text,
        [*first.token_ids, *second.token_ids],
        [*first.logprobs, *second.logprobs],
    )
