"""Puts the deltas of one request in order, whichever replicas they come from.

Deltas carry (generation, index). The highest generation owns the request, and its first delta
repeats everything from index 0, so nothing is missing when the owner changes; what is there already
is dropped. Pure: the ingress wraps a queue around it.

It also watches that no two replicas ever emit for one request. That is a matter of the replicas,
not of this module: what comes from the wrong one is refused here and never reaches the client, but
it is counted.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Literal

from mell_ray.engine.types import FinishReason, TokenLogprobs
from mell_ray.serving.wire import WireDelta, decode_logprobs

GAPS_REMEMBERED = 64

# second-emitter: another replica than the owner speaks for the owner's generation.
# gap: tokens are missing before a delta. regression: a generation tells tokens twice, beyond the
# one repetition with which it begins. divergence: an older generation has tokens that contradict
# those delivered, so it did not stop when it handed the request over.
Violation = Literal["second-emitter", "gap", "regression", "divergence"]


@dataclass(slots=True)
class Accepted:
    """What a delta adds: new tokens from ``index`` on, possibly none."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    error: str | None

    def joined(self, later: Accepted) -> Accepted:
        """This and what comes right behind it."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = [*(self.logprobs or ()), *(later.logprobs or ())]
        tokens = [*self.token_ids, *later.token_ids]
        return Accepted(tokens, logprobs, later.finish_reason, later.error)


@dataclass(frozen=True, slots=True)
class Stall:
    """What the client saw of a hand-over: the gap around it, beside the request's usual one."""

    request_id: str
    generation: int  # of the new owner
    seconds: float
    median_gap_s: float


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
    last_violation: Violation | None = None
    _told: int | None = None  # end of what the present generation has told; None: nothing yet
    _spoke: int = 0  # generation of the last accepted delta
    _at: float | None = None  # when tokens last came
    _gaps: collections.deque[float] = field(
        default_factory=lambda: collections.deque(maxlen=GAPS_REMEMBERED)
    )

    def accept(self, replica_id: str, delta: WireDelta) -> Accepted | None:
        """Take a delta in. None: it is stale and its sender does not own the request.

        A delta that breaks the ownership rules (see ``Violation``) is counted and refused; one
        that only tells again what its own generation has told is counted and adds nothing.
        """
        _, generation, index, token_ids, logprobs, finish_reason, error = delta
        if generation < self.generation:
            if self._contradicts(index, token_ids):
                self._violated("divergence")
            return None
        if self.finished:
            return None
        if generation > self.generation:
            self.generation, self.replica_id, self._told = generation, replica_id, None
        elif replica_id != self.replica_id:
            self._violated("second-emitter")
            return None
        have = len(self.token_ids)
        if index > have:
            self._violated("gap")
            return None
        if self._told is not None and index < self._told:
            self._violated("regression")
        self._told = max(self._told or 0, index + len(token_ids))
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

    def came(self, now: float) -> Stall | None:
        """New tokens were accepted at ``now``. Returns what the client saw of a hand-over, if
        these are the first tokens of another generation."""
        gap = None if self._at is None else now - self._at
        spoke, self._spoke, self._at = self._spoke, self.generation, now
        if gap is None:
            return None
        if spoke == self.generation:
            self._gaps.append(gap)
            return None
        usual = sorted(self._gaps)
        median = usual[len(usual) // 2] if usual else 0.0
        return Stall(self.request_id, self.generation, gap, median)

    def take_over(self, replica_id: str, generation: int) -> None:
        """A lease says where the request lives from now on."""
        if generation > self.generation:
            self._told = None
        self.replica_id = replica_id
        self.generation = max(self.generation, generation)

    def follow(self, src: str, dst: str) -> None:
        """The source says that it handed the request over to ``dst``."""
        if self.replica_id == src and not self.finished:
            self.replica_id = dst

    def _contradicts(self, index: int, token_ids: list[int]) -> bool:
        known = self.token_ids[index : index + len(token_ids)]
        return known != token_ids[: len(known)]

    def _violated(self, what: Violation) -> None:
        self.violations += 1
        self.last_violation = what
