"""Requests through one engine, a fixed number of them at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mell_ray.bench.summary import RequestTimes
from mell_ray.bench.workload import BenchRequest
from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import ServerError

if TYPE_CHECKING:
    from mell_ray.engine import Engine


def run_closed_loop(
    engine: Engine,
    requests: Sequence[BenchRequest],
    concurrency: int,
    on_finish: Callable[[int], None] = lambda _: None,
) -> tuple[list[RequestTimes], float]:
    """Greedy, end tokens ignored. A request is submitted as soon as one before it has finished.

    Args:
        on_finish: called with the output tokens of each request that finished.

    Returns:
        The times of each request, in the order given, and the seconds from the first submission
        to the last token.

    Raises:
        ServerError: a request failed; says why.
    """
    times: list[RequestTimes] = []
    start = time.perf_counter()
    open_requests = 0
    while open_requests or len(times) < len(requests):
        while open_requests < concurrency and len(times) < len(requests):
            index = len(times)
            times.append(RequestTimes(time.perf_counter()))
            engine.add(_state(index, requests[index]))
            open_requests += 1
        output = engine.step()
        now = time.perf_counter()
        for delta in output.deltas:
            if delta.error is not None:
                raise ServerError(f"request {delta.request_id}: {delta.error}")
            request_times = times[int(delta.request_id)]
            request_times.tokens_s += [now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                open_requests -= 1
                on_finish(len(request_times.tokens_s))
    return times, time.perf_counter() - start


def _state(index: int, request: BenchRequest) -> RequestState:
    sampling = SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)
    return RequestState(str(index), request.prompt_token_ids, sampling, arrival_s=float(index))
