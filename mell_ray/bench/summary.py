"""From time stamps to figures. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class RequestTimes:
    """When one request was submitted and when each of its tokens came; seconds of one clock."""

    submitted_s: float
    tokens_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.submitted_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between tokens; those that came together have gaps of zero."""
        return [b - a for a, b in zip(self.tokens_s, self.tokens_s[1:], strict=False)]


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, 99th percentile and mean in milliseconds; None where there is nothing to count."""
    if not seconds:
        return {"p50": None, "p99": None, "mean": None}
    values = np.array(seconds) * 1e3
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "mean": float(values.mean())}


def summarise(times: Sequence[RequestTimes], duration_s: float) -> dict[str, object]:
    """The figures of one run whose requests have all finished."""
    output_tokens = sum(len(t.tokens_s) for t in times)
    return {
        "duration_s": duration_s,
        "num_requests": len(times),
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / duration_s,
        "requests_per_s": len(times) / duration_s,
        "ttft_ms": percentiles_ms([t.ttft_s for t in times]),
        "itl_ms": percentiles_ms([gap for t in times for gap in t.itl_s]),
        "e2e_ms": percentiles_ms([t.tokens_s[-1] - t.submitted_s for t in times]),
    }
