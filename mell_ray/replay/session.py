"""A whole replay: plan, check the server, send, sum up."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mell_ray.errors import MellError
from mell_ray.replay.client import Endpoint
from mell_ray.replay.measure import summarise
from mell_ray.replay.plan import too_long
from mell_ray.replay.prompts import PromptMaker
from mell_ray.replay.run import Watcher, completion_body, open_loop
from mell_ray.replay.types import Job, Outcome, ReplayOptions, Slo, Summary


@dataclass(frozen=True, slots=True)
class Finished:
    model: str
    outcomes: list[Outcome]
    summary: Summary


async def replay(
    jobs: Sequence[Job],
    endpoint: Endpoint,
    options: ReplayOptions,
    *,
    model: str | None = None,
    slo: Slo | None = None,
    watcher: Watcher | None = None,
    warn: Callable[[str], None] = lambda _: None,
    stoppable: Callable[[Callable[[], None]], None] | None = None,
) -> Finished:
    """Send ``jobs`` to ``endpoint``; ``model`` None is the server's first. ``stoppable``: see
    `open_loop`.

    Raises:
        MellError: the server does not answer, or is none; stopped before any request had ended.
        ConfigError: it does not have the model.
    """
    name, context = await endpoint.model(model)
    refused = too_long(jobs, context) if context is not None else 0
    if refused:
        warn(
            f"{refused:,} of {len(jobs):,} requests are longer than the model's context of "
            f"{context:,} tokens and will be refused; --max-prompt and --max-output cut them, "
            "--scale-prompt and --scale-output shrink all"
        )
    allow_sockets()
    prompts = PromptMaker(*options.token_ids, options.seed)
    begin = asyncio.get_running_loop().time()
    outcomes = await open_loop(
        jobs, lambda job: completion_body(job, name, prompts), endpoint.send, watcher, stoppable
    )
    if not outcomes:
        raise MellError("interrupted before any request had ended")
    ran_s = asyncio.get_running_loop().time() - begin
    left_out = len(jobs) - len(outcomes)
    summary = summarise(outcomes, slo or Slo(), left_out=left_out, ran_s=ran_s)
    return Finished(name, outcomes, summary)


def allow_sockets() -> None:
    """Raise this process's limit of open files: a running request takes a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where the system says no, its limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
