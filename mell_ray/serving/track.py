"""Puts the deltas of one request in order, whichever replicas they come from.

Deltas carry (generation, index). The highest generation owns the request, and its first delta
repeats everything from index 0, so nothing is missing when the owner changes; what is there already
is dropped. Pure: the ingress wraps a queue around it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mell_ray.engine.types import FinishReason, TokenLogprobs
from mell_ray.serving.wire import WireDelta, decode_logprobs


@dataclass(slots=True)
class Accepted:
    """What a delta adds: new tokens from ``index`` on, possibly none."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    error: str | None


@dataclass(slots=True)
class Track:
    """The state of one request at its ingress."""

    request_id: str
    replica_id: str  # the owner, as far as known here
    generation: int
    token_ids: list[int] = field(default_factory=list)  # received so far, each exactly once
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the same, if asked for
    finished: bool = False
    violations: int = 0  # deltas that broke the ownership rules; must stay 0

    def accept(self, replica_id: str, delta: WireDelta) -> Accepted | None:
        """Take a delta in. None: it is stale and its sender does not own the request.

        A delta of the present generation from another replica than the owner, or one that leaves a
        gap, counts as a violation and is refused.
        """
        _, generation, index, token_ids, logprobs, finish_reason, error = delta
        if self.finished or generation < self.generation:
            return None
        if generation > self.generation:
            self.generation, self.replica_id = generation, replica_id
        elif replica_id != self.replica_id:
            self.violations += 1
            return None
        have = len(self.token_ids)
        if index > have:
            self.violations += 1
            return None
        skip = have - index
        fresh = token_ids[skip:] if skip else token_ids
        self.token_ids += fresh
        fresh_logprobs = decode_logprobs(logprobs[skip:] if logprobs else None)
        self.logprobs += fresh_logprobs or ()
        self.finished = finish_reason is not None
        return Accepted(fresh, fresh_logprobs, finish_reason, error)

    def is_ahead(self, delta: WireDelta) -> bool:
        """Whether a refused delta holds tokens that are not here: its sender still decodes a
        request that it does not own, rather than being late."""
        return delta[2] + len(delta[3]) > len(self.token_ids)

    def take_over(self, replica_id: str, generation: int) -> None:
        """A lease says where the request lives from now on."""
        self.replica_id = replica_id
        self.generation = max(self.generation, generation)

    def follow(self, src: str, dst: str) -> None:
        """The source says that it handed the request over to ``dst``."""
        if self.replica_id == src and not self.finished:
            self.replica_id = dst
