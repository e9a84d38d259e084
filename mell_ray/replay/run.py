"""The open loop: requests leave at their times, whatever became of those before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from mell_ray.replay.prompts import PromptMaker
from mell_ray.replay.types import Job, Outcome

Send = Callable[[Job, bytes, Callable[[], float]], Awaitable[Outcome]]


class Watcher(Protocol):
    """Is told of what happens, for a progress bar."""

    def sent(self) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


def completion_body(job: Job, model: str, prompts: PromptMaker) -> bytes:
    """The body of ``POST /v1/completions``: an answer of exactly ``job.output_tokens`` tokens.

    Sampling is greedy, so that a replay asks for the same tokens each time.
    """
    body = {
        "model": model,
        "prompt": prompts.tokens(job),
        "max_tokens": job.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


async def open_loop(
    jobs: Sequence[Job],
    make_body: Callable[[Job], bytes],
    send: Send,
    watcher: Watcher | None = None,
    stoppable: Callable[[Callable[[], None]], None] | None = None,
) -> list[Outcome]:
    """Send every job at its time and wait for all answers; outcomes are in the jobs' order.

    A body is made while the time of its job has not come, not in it. ``stoppable`` is given a
    function that ends the replay early: nothing more is sent, what runs is dropped, and only what
    has ended comes back.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()

    def clock() -> float:
        return loop.time() - start

    async def one(job: Job, body: bytes) -> Outcome:
        outcome = await send(job, body, clock)
        if watcher is not None:
            watcher.ended(outcome)
        return outcome

    tasks: list[asyncio.Task[Outcome]] = []

    async def feed(group: asyncio.TaskGroup) -> None:
        for job in jobs:
            body = make_body(job)
            # Also where this is late already: answers must be read between two requests.
            await asyncio.sleep(max(0.0, job.at_s - clock()))
            tasks.append(group.create_task(one(job, body)))
            if watcher is not None:
                watcher.sent()

    async with asyncio.TaskGroup() as group:
        feeder = group.create_task(feed(group))

        def stop() -> None:
            for task in (feeder, *tasks):
                task.cancel()

        if stoppable is not None:
            stoppable(stop)
    return [task.result() for task in tasks if not task.cancelled()]
