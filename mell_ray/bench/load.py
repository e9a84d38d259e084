"""Requests that are kept running beside what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mell_ray.bench.rig import Rig, Watched


class Load:
    """A closed loop of short requests, beside which something is measured."""

    def __init__(self, rig: Rig, prompt: Callable[[int], list[int]]) -> None:
        self._rig = rig
        self._prompt = prompt
        self._tokens: list[tuple[float, int]] = []
        self._first: list[tuple[float, float]] = []
        self._running: list[Watched] = []
        self.stop = False

    async def keep(self, replica: Any) -> int:
        """One request after the other. Returns how often one was emitted twice."""
        violations = 0
        while not self.stop:
            watched = await self._rig.submit(replica, self._prompt(128), 64)
            self._running.append(watched)
            await watched.ended.wait()
            self._running.remove(watched)
            self._tokens += watched.token_s
            self._first.append((watched.token_s[0][0], watched.ttft_s))
            violations += watched.track.violations
            self._rig.forget(watched)
        return violations

    def mark(self) -> float:
        return time.monotonic()

    def since(self, mark: float) -> tuple[int, list[float]]:
        """Tokens delivered, and times to first token of requests that began to answer, since."""
        delivered = [*self._tokens, *(item for w in self._running for item in w.token_s)]
        tokens = sum(count for at, count in delivered if at >= mark)
        begun = [(w.token_s[0][0], w.ttft_s) for w in self._running if w.token_s]
        return tokens, [ttft for at, ttft in [*self._first, *begun] if at >= mark]
