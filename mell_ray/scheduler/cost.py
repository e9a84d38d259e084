"""What a migration costs: by KV transfer, by tokens (prefill at the target), or both at once.

* KV: what any such move takes + bytes / the link's bandwidth.
* Token: the same + tokens not in the target's prefix cache / its prefill rate at present load. A
  token late in a long prompt takes longer, as it attends to all before it.
* Hybrid: the split at which both finish together: with rates k and p (tokens a second) a share
  k/(k + p) of what is left goes as KV, after the latency. It has to be clearly better than either
  to be chosen, since both ways have to be as fast as estimated.

Every finished migration corrects the estimates; the first replaces what was guessed. A single odd
one later moves them by a bounded factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from mell_ray.scheduler.events import MigrationDone, MigrationMode

if TYPE_CHECKING:
    from mell_ray.scheduler.state import Gpu

_LEARN = 0.2  # weight of the newest observation
_OUTLIER = 4.0  # an observation counts as at most that factor off the estimate
_LEAST_S = 1e-6  # a rate learnt by factors cannot start at zero
_HYBRID_GAIN = 0.8  # a hybrid's share of the faster mode's time, at most
_TOKEN_OVERHEAD = 0.2  # of a link's latency: first guess of what any token migration takes


@dataclass(frozen=True)
class CostConfig:
    """First estimates, corrected by what is observed."""

    bytes_per_token: int = 131072
    link_bytes_per_s: float = 5e9
    link_latency_s: float = 0.005
    prefill_tokens_per_s: float = 8000.0
    hybrid: bool = False  # whether the driver can split a migration


class Estimate(NamedTuple):
    mode: MigrationMode
    seconds: float
    kv_tokens: int  # of the request's tokens, those that travel as KV


_seconds = attrgetter("seconds")


class _Rate:
    """A positive quantity learnt online: a geometric moving average that outliers cannot throw."""

    __slots__ = ("observations", "value")

    def __init__(self, value: float) -> None:
        self.value = value
        self.observations = 0

    def observe(self, value: float) -> None:
        if value <= 0.0:
            return
        factor = value / self.value
        self.observations += 1
        if self.observations > 3:  # the first guess may be far off, later jumps are noise
            factor = min(max(factor, 1 / _OUTLIER), _OUTLIER)
        weight = 1 / self.observations
        self.value *= factor ** (weight if weight > _LEARN else _LEARN)


class CostModel:
    """Estimates of one model, per pair of nodes (KV) and per GPU (prefill)."""

    def __init__(self, config: CostConfig, tokens_per_unit: int, forced: str = "auto") -> None:
        self._config = config
        self._bytes_per_token = config.bytes_per_token
        self._doubles_at = math.inf
        self._unit = tokens_per_unit
        self._forced = forced
        self._links: dict[tuple[str, str], _Rate] = {}
        self._any_link = _Rate(config.link_bytes_per_s)
        self._prefill: dict[str, _Rate] = {}
        self._any_prefill = _Rate(config.prefill_tokens_per_s)
        self._kv_overhead = _Rate(max(config.link_latency_s, _LEAST_S))
        self._token_overhead = _Rate(max(config.link_latency_s * _TOKEN_OVERHEAD, _LEAST_S))

    def set_kv_bytes(self, per_token: int) -> None:
        """What a token of this model really weighs."""
        self._bytes_per_token = per_token

    def set_attention(self, doubles_at: float) -> None:
        """How many tokens must lie before one for it to take twice as long to prefill as the
        first; infinite: all take the same."""
        self._doubles_at = doubles_at

    def bandwidth(self, src: Gpu, dst: Gpu) -> float:
        """Bytes a second between the two GPUs' nodes."""
        return self._links.get((src.node, dst.node), self._any_link).value

    def prefill_rate(self, gpu: Gpu) -> float:
        """Tokens a second at which ``gpu`` prefills where few lie before them, at the load it has
        had lately."""
        return self._prefill.get(gpu.id, self._any_prefill).value

    def estimates(self, src: Gpu, dst: Gpu, tokens: int, cached: int = 0) -> list[Estimate]:
        """One per mode that the driver has; ``cached`` leading tokens are at ``dst`` already."""
        config = self._config
        left = max(0, tokens - cached)
        kv_rate = self.bandwidth(src, dst) / self._bytes_per_token
        prefill_rate = self.prefill_rate(dst) / self._slower(cached, left)
        latency = self._kv_overhead.value
        found = [
            Estimate("kv", latency + left / kv_rate, left),
            Estimate("token", self._token_overhead.value + left / prefill_rate, 0),
        ]
        if config.hybrid or self._forced == "hybrid":
            both = (left + latency * kv_rate) / (kv_rate + prefill_rate)
            if both > latency:
                by_kv = round((both - latency) * kv_rate)
                found.append(Estimate("hybrid", both, by_kv))
        return found

    def choose(self, src: Gpu, dst: Gpu, size: int, cached: int = 0) -> Estimate:
        """The fastest way to move ``size`` units, ``cached`` of them at ``dst`` already; the
        simpler way if two are equal. Where a mode is prescribed that one, or the fastest if it
        cannot help here (a hybrid whose latency alone takes longer than the rest)."""
        options = self.estimates(src, dst, size * self._unit, cached * self._unit)
        if self._forced != "auto":
            options = [e for e in options if e.mode == self._forced] or options
        best = min(options, key=_seconds)
        if best.mode == "hybrid" and len(options) > 1:
            other = min((e for e in options if e is not best), key=_seconds)
            return best if best.seconds <= _HYBRID_GAIN * other.seconds else other
        return best

    def price(self) -> float:
        """GPU-seconds that moving one unit costs, by the faster of KV and prefill: a moved
        request holds its memory twice for that long."""
        kv_rate = self._any_link.value / self._bytes_per_token
        return self._unit / max(kv_rate, self._any_prefill.value)

    def observe(self, src: Gpu, dst: Gpu, done: MigrationDone) -> None:
        """Learn from a finished migration. A hybrid one says nothing of either way alone."""
        if done.mode == "kv":
            busy = _apart(done, self._kv_overhead)
            if done.bytes > 0 and busy > 0.0:
                link = self._links.setdefault((src.node, dst.node), _Rate(self._any_link.value))
                link.observe(done.bytes / busy)
                self._any_link.observe(done.bytes / busy)
        elif done.mode == "token":
            busy = _apart(done, self._token_overhead)
            if done.tokens > 0 and busy > 0.0:
                rate = self._prefill.setdefault(dst.id, _Rate(self._any_prefill.value))
                found = done.tokens / busy * self._slower(done.cached_tokens, done.tokens)
                rate.observe(found)
                self._any_prefill.observe(found)

    def _slower(self, cached: int, tokens: int) -> float:
        """How many times as long ``tokens`` take behind ``cached`` ones as without any before."""
        return 1.0 + (cached + 0.5 * tokens) / self._doubles_at

    def forget(self, gpu: Gpu) -> None:
        """The GPU is gone."""
        self._prefill.pop(gpu.id, None)


def _apart(done: MigrationDone, overhead: _Rate) -> float:
    """The seconds of a migration that grew with its size; what is left corrects ``overhead``."""
    if done.copy_seconds <= 0.0:
        return done.seconds - overhead.value
    overhead.observe(done.seconds - done.copy_seconds)
    return done.copy_seconds
