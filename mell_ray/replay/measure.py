"""From outcomes to figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mell_ray.replay.types import ErrorCount, Outcome, Slo, Spread, Summary

#: A request sent more than that after its time is a late start.
LATE_S = 0.05

#: From that share of late starts on, figures say more of this client than of the server.
LATE_SHARE = 0.01


def spread_ms(seconds: Iterable[float]) -> Spread:
    """Percentiles (linear between neighbours), mean and maximum, in milliseconds."""
    values = np.fromiter(seconds, dtype=float) * 1e3
    if not len(values):
        return Spread()
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return Spread(p50, p90, p99, float(values.mean()), float(values.max()))


def summarise(
    outcomes: Sequence[Outcome], slo: Slo, *, left_out: int = 0, ran_s: float = 0.0
) -> Summary:
    """The figures of a replay of at least one request. ``left_out``: see `Summary`. One that was
    interrupted counts as ``ran_s`` seconds at least: rates are not those up to the last answer."""
    ok = [o for o in outcomes if o.failure is None]
    last_s = max(o.end_s for o in outcomes)
    if left_out:
        last_s = max(last_s, ran_s)
    duration = last_s - min(o.job.at_s for o in outcomes)
    seconds = max(duration, 1e-9)
    output_tokens = sum(o.tokens for o in outcomes)  # what failed had cost the server as well
    good = sum(map(slo.met, outcomes))
    return Summary(
        requests=len(outcomes),
        ok=len(ok),
        failed=len(outcomes) - len(ok),
        duration_s=duration,
        prompt_tokens=sum(o.job.prompt_tokens for o in ok),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / seconds,
        requests_per_s=len(ok) / seconds,
        peak_running=_peak(outcomes),
        ttft_ms=spread_ms(o.ttft_s for o in ok if o.ttft_s is not None),
        tpot_ms=spread_ms(o.tpot_s for o in ok if o.tpot_s is not None),
        itl_ms=spread_ms(gap for o in ok for gap in o.gaps_s),
        e2e_ms=spread_ms(o.end_s - o.sent_s for o in ok),
        slo=slo,
        good=good,
        goodput_per_s=good / seconds,
        errors=count_errors(outcomes),
        late_ms=spread_ms(o.late_s for o in outcomes),
        late_starts=sum(o.late_s > LATE_S for o in outcomes),
        uncounted=sum(not o.counted for o in ok),
        left_out=left_out,
    )


def count_errors(outcomes: Iterable[Outcome]) -> tuple[ErrorCount, ...]:
    """Failures by kind, the most frequent first, equal counts by name."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            kind = outcome.failure.kind
            counts[kind] = counts.get(kind, 0) + 1
            examples.setdefault(kind, outcome.failure.message)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ErrorCount(kind, count, examples[kind]) for kind, count in ordered)


def running_over_time(outcomes: Iterable[Outcome]) -> list[tuple[float, int]]:
    """(time, requests in flight from then on), one entry per change."""
    changes = sorted([(o.sent_s, 1) for o in outcomes] + [(o.end_s, -1) for o in outcomes])
    running, points = 0, []
    for at, change in changes:
        running += change
        points.append((at, running))
    return points


def is_late(summary: Summary) -> bool:
    """Whether this client was too slow for its figures to be the server's."""
    return summary.late_starts > LATE_SHARE * summary.requests


def as_json(summary: Summary, about: dict[str, Any]) -> dict[str, Any]:
    """Every figure, with ``about`` (trace, server, settings) in front."""
    return {**about, **asdict(summary)}


def _peak(outcomes: Iterable[Outcome]) -> int:
    return max((running for _, running in running_over_time(list(outcomes))), default=0)
