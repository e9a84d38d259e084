"""What an ingress tells the Router once a second about the requests it serves. Picklable."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Pulse:
    """Since the pulse before. Samples are at most ``MAX_SAMPLES`` each; times in seconds."""

    tokens: int = 0
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    stall_s: tuple[float, ...] = ()


def thinned(values: list[float], limit: int) -> list[float]:
    """At most ``limit`` of ``values``, evenly over the list."""
    if len(values) <= limit:
        return values
    return [values[i * len(values) // limit] for i in range(limit)]
