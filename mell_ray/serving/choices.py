"""From jobs to what their choices add: text, tool calls, ends. No HTTP, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from mell_ray.openai.response import ApiFinishReason, finish_reason
from mell_ray.openai.text import TextPiece
from mell_ray.openai.tool_calls import CallDelta, ToolCallParser
from mell_ray.serving.prepared import Prepared
from mell_ray.serving.runner import Job
from mell_ray.serving.track import Accepted


class Runs(Protocol):
    """What generates tokens: a Runner."""

    def run(self, job: Job) -> AsyncGenerator[Accepted, None]: ...


@dataclass(slots=True)
class ChoiceEvent:
    """What one choice has to add; ``reason`` with its last event."""

    index: int
    piece: TextPiece
    reason: ApiFinishReason | None
    calls: Sequence[CallDelta] = ()  # found in the text, which then is not in ``piece``


def choice_events(runs: Runs, prepared: Prepared) -> AsyncGenerator[ChoiceEvent, None]:
    """Events of all choices as they come; closing it drops what still runs."""
    several = len(prepared.jobs) > 1
    events = _merged(runs, prepared) if several else _choice(runs, prepared, 0)
    return events if prepared.span is None else _traced(prepared, events)


async def _traced(
    prepared: Prepared, events: AsyncGenerator[ChoiceEvent, None]
) -> AsyncGenerator[ChoiceEvent, None]:
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    finally:
        prepared.span.end()


async def _merged(runs: Runs, prepared: Prepared) -> AsyncGenerator[ChoiceEvent, None]:
    """Events of several choices that run at once."""
    queue: asyncio.Queue[ChoiceEvent | BaseException | None] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_feed(runs, prepared, i, queue)) for i in range(len(prepared.jobs))
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
    runs: Runs,
    prepared: Prepared,
    index: int,
    queue: asyncio.Queue[ChoiceEvent | BaseException | None],
) -> None:
    try:
        async with aclosing(_choice(runs, prepared, index)) as events:
            async for event in events:
                queue.put_nowait(event)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


async def _choice(runs: Runs, prepared: Prepared, index: int) -> AsyncGenerator[ChoiceEvent, None]:
    """One choice from tokens to text; stops the request where a stop string is complete."""
    generation = prepared.generations[index]
    text = generation.open_text(prepared.model.tokenizer, prepared.model.end_token_ids)
    tools = generation.open_tools(prepared.request_id)
    async with aclosing(runs.run(prepared.jobs[index])) as accepted:
        async for several in accepted:
            for delta in (several,) if tools is None else _one_by_one(several):
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


def _one_by_one(several: Accepted) -> Iterator[Accepted]:
    """What follows the token that ends an answer is none of it, however many come at once."""
    for i, token in enumerate(several.token_ids[:-1]):
        yield Accepted([token], several.logprobs and several.logprobs[i : i + 1], None, None)
    yield replace(
        several,
        token_ids=several.token_ids[-1:],
        logprobs=several.logprobs and several.logprobs[-1:],
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
