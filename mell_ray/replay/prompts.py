"""Synthetic prompts: token ids of the right number, alike exactly where the trace says so.

Requests whose prefix hashes begin alike have prompts that begin alike, for as many blocks; from
there on, and where the trace has no hashes from the start, prompts differ. The same seed gives the
same prompts on every machine.
"""

from __future__ import annotations

import hashlib
from array import array

from mell_ray.replay.types import Job


class PromptMaker:
    """Makes the prompt of a request; keeps nothing between two requests.

    Args:
        low, high: token ids are drawn from ``[low, high)``.
    """

    def __init__(self, low: int, high: int, seed: int) -> None:
        self._low = low
        self._span = high - low
        self._seed = seed

    def tokens(self, job: Job) -> list[int]:
        """``job.prompt_tokens`` token ids."""
        tokens: list[int] = []
        chain = hashlib.blake2b(f"{self._seed}".encode(), digest_size=16)
        for prefix_hash in job.prefix_hashes:
            missing = job.prompt_tokens - len(tokens)
            if missing <= 0:
                break
            # Chained here too: a trace whose hashes name blocks, not chains, is read the same way.
            chain.update(f"/{prefix_hash}".encode())
            tokens += self._draw(chain.digest(), min(missing, job.prefix_block))
        own = f"{self._seed}/request/{job.number}".encode()
        return tokens + self._draw(own, job.prompt_tokens - len(tokens))

    def _draw(self, key: bytes, count: int) -> list[int]:
        """``count`` token ids that depend on ``key`` alone; a longer draw begins with a shorter."""
        words = array("I", hashlib.shake_128(key).digest(4 * count))
        return [self._low + word % self._span for word in words]
