"""What is done to a trace before it is run. Pure functions on rows in order of arrival."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from mell_ray.simulation.types import SimOptions, TraceRow


def drop_larger(rows: Iterable[TraceRow], gpu_tokens: int) -> list[TraceRow]:
    """Without the requests that no GPU can hold to their end."""
    return [r for r in rows if r.prompt_tokens + r.output_tokens <= gpu_tokens]


def compress(rows: Iterable[TraceRow], factor: float) -> list[TraceRow]:
    """Arrivals come ``factor`` times faster; lengths stay."""
    return [replace(r, arrival_s=r.arrival_s / factor) for r in rows]


def superpose(rows: Sequence[TraceRow], copies: float, rng: Random) -> list[TraceRow]:
    """``copies`` of the trace at independent circular time shifts, renumbered by arrival.

    The time scale stays as it is, and bursts of one copy do not meet those of another. A fraction
    of a copy keeps each of its requests with that probability.
    """
    if not rows:
        return []
    first, last = rows[0].arrival_s, rows[-1].arrival_s
    # One mean gap after the last arrival it starts again, with the first one.
    period = (last - first) * (1 + 1 / len(rows))
    found: list[tuple[float, int, TraceRow]] = []
    whole = int(copies)
    for copy in range(whole + (copies > whole)):
        shift = rng.random() * period if copy else 0.0
        share = 1.0 if copy < whole else copies - whole
        for row in rows:
            if share == 1.0 or rng.random() < share:
                moved = row.arrival_s + shift
                found.append((moved - period if moved - first >= period else moved, copy, row))
    found.sort(key=lambda entry: (entry[0], entry[1], entry[2].request))
    return [replace(row, request=i, arrival_s=at) for i, (at, _, row) in enumerate(found)]


def spread_ties(rows: Sequence[TraceRow], rng: Random) -> list[TraceRow]:
    """Arrivals recorded on a coarse clock, spread at random up to its next reading.

    The clock's step is the median gap between different arrival times.
    """
    times = sorted({r.arrival_s for r in rows})
    gaps = sorted(b - a for a, b in pairwise(times))
    step = gaps[len(gaps) // 2] if gaps else 0.0
    spread = [replace(r, arrival_s=r.arrival_s + step * rng.random()) for r in rows]
    return sorted(spread, key=lambda r: (r.arrival_s, r.request))


def prepare(rows: Sequence[TraceRow], options: SimOptions) -> tuple[list[TraceRow], int]:
    """The rows to run, in order of arrival, and how many were left out as too large.

    Row numbers stay the file's unless copies are superposed.
    """
    kept = sorted(rows, key=lambda r: (r.arrival_s, r.request))
    if options.drop_larger:
        kept = drop_larger(kept, options.gpu_tokens)
    dropped = len(rows) - len(kept)
    if options.time_compression != 1.0:
        kept = compress(kept, options.time_compression)
    if options.copies != 1.0:
        kept = superpose(kept, options.copies, Random(options.seed))
    return kept, dropped
