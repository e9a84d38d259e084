"""From trace rows to requests with a time, a prompt length and an output length."""

from __future__ import annotations

from collections.abc import Sequence

from mell_ray.errors import ConfigError
from mell_ray.replay.types import Job, ReplayOptions
from mell_ray.simulation.types import TraceRow

#: Tokens that one entry of a trace's ``prefix_hashes`` stands for.
HASHED_TOKENS = 512


def plan(rows: Sequence[TraceRow], options: ReplayOptions) -> list[Job]:
    """The requests to send, in order of arrival. The first one is sent at once.

    Raises:
        ConfigError: nothing is left to send.
    """
    if not rows:
        raise ConfigError("the trace has no requests")
    first = min(row.arrival_s for row in rows)
    until = float("inf") if options.seconds is None else first + options.seconds
    block = max(1, round(HASHED_TOKENS * options.scale_prompt))
    jobs = [
        Job(
            row.request,
            (row.arrival_s - first) / options.time_compression,
            scaled(row.prompt_tokens, options.scale_prompt, options.max_prompt),
            scaled(row.output_tokens, options.scale_output, options.max_output),
            row.prefix_hashes,
            block,
        )
        for row in rows
        if row.arrival_s < until
    ]
    return sorted(jobs, key=lambda job: (job.at_s, job.number))


def scaled(tokens: int, factor: float, most: int | None) -> int:
    """At least one token, at most ``most``."""
    wanted = max(1, round(tokens * factor))
    return wanted if most is None else min(wanted, most)


def too_long(jobs: Sequence[Job], context: int) -> int:
    """How many requests do not fit into a context of that many tokens."""
    return sum(job.prompt_tokens + job.output_tokens > context for job in jobs)
