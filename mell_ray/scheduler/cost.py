"""What a migration costs: by KV transfer, by tokens (prefill at the target), or both at once.

* KV: latency of the link + bytes / its bandwidth.
* Token: tokens not in the target's prefix cache / its prefill rate at its present load.
* Hybrid: the split at which both finish together: with rates k and p (tokens a second) a share
  k/(k + p) of what is left goes as KV, after the latency.

Every finished migration corrects the estimates. A single odd one moves them by a bounded factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mell_ray.scheduler.events import MigrationDone, MigrationMode

if TYPE_CHECKING:
    from mell_ray.scheduler.state import Gpu

_LEARN = 0.2  # weight of the newest observation
_OUTLIER = 4.0  # an observation counts as at most that factor off the estimate


@dataclass(frozen=True)
class CostConfig:
    """First estimates, corrected by what is observed."""

    bytes_per_token: int = 131072
    link_bytes_per_s: float = 5e9
    link_latency_s: float = 0.005
    prefill_tokens_per_s: float = 8000.0
    hybrid: bool = False  # whether the driver can split a migration


@dataclass(frozen=True, slots=True)
class Estimate:
    mode: MigrationMode
    seconds: float
    kv_tokens: int  # of the request's tokens, those that travel as KV


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
        self.value *= factor ** max(_LEARN, 1 / (self.observations + 1))


class CostModel:
    """Estimates of one model, per pair of nodes (KV) and per GPU (prefill)."""

    def __init__(self, config: CostConfig, tokens_per_unit: int, forced: str = "auto") -> None:
        self._config = config
        self._bytes_per_token = config.bytes_per_token
        self._unit = tokens_per_unit
        self._forced = forced
        self._links: dict[tuple[str, str], _Rate] = {}
        self._any_link = _Rate(config.link_bytes_per_s)
        self._prefill: dict[str, _Rate] = {}
        self._any_prefill = _Rate(config.prefill_tokens_per_s)

    def set_kv_bytes(self, per_token: int) -> None:
        """What a token of this model really weighs."""
        self._bytes_per_token = per_token

    def bandwidth(self, src: Gpu, dst: Gpu) -> float:
        """Bytes a second between the two GPUs' nodes."""
        return self._links.get((src.node, dst.node), self._any_link).value

    def prefill_rate(self, gpu: Gpu) -> float:
        """Tokens a second at which ``gpu`` prefills, at the load it has had lately."""
        return self._prefill.get(gpu.id, self._any_prefill).value

    def estimates(self, src: Gpu, dst: Gpu, tokens: int, cached: int = 0) -> list[Estimate]:
        """One per mode that the driver has; ``cached`` leading tokens are at ``dst`` already."""
        config = self._config
        left = max(0, tokens - cached)
        kv_rate = self.bandwidth(src, dst) / self._bytes_per_token
        prefill_rate = self.prefill_rate(dst)
        found = [
            Estimate("kv", config.link_latency_s + left / kv_rate, left),
            Estimate("token", left / prefill_rate, 0),
        ]
        if config.hybrid or self._forced == "hybrid":
            both = (left + config.link_latency_s * kv_rate) / (kv_rate + prefill_rate)
            if both > config.link_latency_s:
                by_kv = round((both - config.link_latency_s) * kv_rate)
                found.append(Estimate("hybrid", both, by_kv))
        return found

    def choose(self, src: Gpu, dst: Gpu, size: int, cached: int = 0) -> Estimate:
        """The fastest way to move ``size`` units, ``cached`` of them at ``dst`` already; the
        simpler way if two are equal. Where a mode is prescribed that one, or the fastest if it
        cannot help here (a hybrid whose latency alone takes longer than the rest)."""
        options = self.estimates(src, dst, size * self._unit, cached * self._unit)
        allowed = [e for e in options if self._forced in ("auto", e.mode)]
        return min(allowed or options, key=lambda e: e.seconds)

    def price(self) -> float:
        """GPU-seconds that moving one unit costs, by the faster of KV and prefill: a moved
        request holds its memory twice for that long."""
        kv_rate = self._any_link.value / self._bytes_per_token
        return self._unit / max(kv_rate, self._any_prefill.value)

    def observe(self, src: Gpu, dst: Gpu, done: MigrationDone) -> None:
        """Learn from a finished migration. A hybrid one says nothing of either way alone."""
        if done.mode == "kv":
            self.observe_kv(src, dst, done.bytes, done.seconds)
        elif done.mode == "token":
            self.observe_prefill(dst, done.tokens, done.seconds)

    def observe_kv(self, src: Gpu, dst: Gpu, moved_bytes: int, seconds: float) -> None:
        """Learn from a finished KV migration."""
        busy = seconds - self._config.link_latency_s
        if moved_bytes <= 0 or busy <= 0.0:
            return
        link = self._links.setdefault((src.node, dst.node), _Rate(self._any_link.value))
        link.observe(moved_bytes / busy)
        self._any_link.observe(moved_bytes / busy)

    def observe_prefill(self, gpu: Gpu, tokens: int, seconds: float) -> None:
        """Learn from a finished token migration to ``gpu``."""
        if tokens <= 0 or seconds <= 0.0:
            return
        rate = self._prefill.setdefault(gpu.id, _Rate(self._any_prefill.value))
        rate.observe(tokens / seconds)
        self._any_prefill.observe(tokens / seconds)

    def forget(self, gpu: Gpu) -> None:
        """The GPU is gone."""
        self._prefill.pop(gpu.id, None)
