"""Life of GPUs: when one is asked for, kept ready, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mell_ray.scheduler.config import SchedulerConfig
from mell_ray.scheduler.events import AcquireGpu, Decision, ReleaseGpu, WithdrawGpu
from mell_ray.scheduler.state import Gpu, Pool

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_LOOK_BACK = 16  # of the starting GPUs with promises, the latest that are looked at for room


class Starting:
    """A GPU that was asked for and is not there yet."""

    __slots__ = ("needless_since", "promised", "requests", "since", "wakes")

    def __init__(self, since: float, wakes: bool) -> None:
        self.since = since
        self.wakes = wakes  # it slept
        self.promised = 0  # of its capacity, to requests that will need it
        self.requests = 0  # how many these are
        self.needless_since: float | None = None  # since when nothing has been promised to it


class Fleet:
    """The GPUs of one model that come and go.

    Sizes that found no room are promised to starting GPUs first; another one is asked for only
    when no starting GPU has room for them.
    """

    def __init__(
        self, pool: Pool, config: SchedulerConfig, released: Callable[[Gpu], None]
    ) -> None:
        """``released`` is told of each GPU that is given back."""
        self._pool = pool
        self._config = config
        self._released = released
        self.starting: list[Starting] = []
        self._filling = 0  # the latest of them that something is promised to
        self._relieved: dict[Gpu, int] = {}  # overfull GPUs, and what has been promised for them
        self.startup_s = config.startup_s
        self.wake_s = 0.0  # as learnt; 0 before any has woken
        self.asleep: dict[str, None] = {}  # ids, the one that fell asleep last at the end
        self.contended = False  # others wait for what this fleet has
        self.foreseen = 0  # GPUs that will be needed when one asked for now comes
        self._short_since: float | None = None  # when what is foreseen began to be too little
        self._retry_at = float("-inf")
        self._retry_s = _FIRST_RETRY_S

    def total(self) -> int:
        """GPUs there and to come; those that are being emptied are as good as gone."""
        return len(self._pool.gpus) - len(self._pool.draining) + len(self.starting)

    def lag_s(self) -> float:
        """How long it takes until a GPU that is asked for now is there."""
        return self.wake_s if self.asleep else self.startup_s

    def can_grow(self, now: float) -> bool:
        return self.total() < self._pool.limits.max_gpus and now >= self._retry_at

    def want(self, need: int, now: float, out: list[Decision], reason: str) -> bool:
        """See to it that a GPU comes on which ``need`` fits; False: none can."""
        capacity, most = self._pool.capacity or need, self._pool.max_requests
        while True:
            for starting in self.starting[max(0, self._filling - _LOOK_BACK) : self._filling + 1]:
                if starting.promised + need <= capacity and starting.requests < most:
                    starting.promised += need
                    starting.requests += 1
                    return True
            if self._filling + 1 >= len(self.starting):
                break
            self._filling += 1
        if not self.can_grow(now) or self._await_forecast(now):
            return False
        starting = self._acquire(now, out, reason)
        starting.promised, starting.requests = need, 1
        self._filling = len(self.starting) - 1
        return True

    def relieve(self, gpu: Gpu, stuck: int, now: float, out: list[Decision]) -> bool:
        """As ``want`` for what is too much on ``gpu``, which says so again with every report: only
        what has come on top since promises were last counted is promised anew."""
        more = stuck - self._relieved.get(gpu, 0)
        if more > 0:
            if not self.want(more, now, out, "overflow"):
                return False
            self._relieved[gpu] = stuck
        return True

    def _await_forecast(self, now: float) -> bool:
        """Where GPUs are opened by forecast, something that waits is no reason for one more until
        it has waited as long as a GPU takes to start: by then most of it has found room."""
        if not self._config.forecast or not self.total():
            return False
        if self._short_since is None:
            self._short_since = now
        return now - self._short_since < self.lag_s()

    def _acquire(self, now: float, out: list[Decision], reason: str) -> Starting:
        wake = self.asleep.popitem()[0] if self.asleep else None
        starting = Starting(now, wake is not None)
        self.starting.append(starting)
        out.append(AcquireGpu(self._pool.model, reason, wake))
        return starting

    def arrived(self, now: float, gpu: str, woken: bool, took_s: float | None) -> None:
        """A GPU is ready; the first of its kind that was asked for counts as come. One that was
        to fall asleep and could not was not asked for."""
        if gpu in self.asleep:
            del self.asleep[gpu]
            return
        self._relieved.clear()
        if self.starting:
            first = self._first(woken)
            took = now - first.since if took_s is None else took_s
            if woken:
                self.wake_s += (0.3 if self.wake_s else 1.0) * (took - self.wake_s)
            else:
                self.startup_s += (0.3 if self.startup_s else 1.0) * (took - self.startup_s)
        self._retry_s = _FIRST_RETRY_S
        self._retry_at = float("-inf")

    def failed(self, now: float) -> None:
        """A GPU did not come; wait before the next try, longer each time."""
        self._relieved.clear()
        if self.starting:
            self._first(False)
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def _first(self, wakes: bool) -> Starting:
        """Takes the GPU that was asked for first off the list, of those that sleep or of the
        others if there is one."""
        self._filling = max(0, self._filling - 1)
        kinds = [starting.wakes for starting in self.starting]
        return self.starting.pop(kinds.index(wakes) if wakes in kinds else 0)

    def renew_promises(self, needs: Iterable[int], now: float, out: list[Decision]) -> None:
        """Count anew what is waiting, and ask for the GPUs that it takes."""
        for starting in self.starting:
            starting.promised = starting.requests = 0
        self._filling = 0
        self._relieved.clear()
        for need in needs:
            self.want(need, now, out, "demand")

    def adjust(self, now: float, busy: bool, out: list[Decision]) -> None:
        """Keep the minimum, the spares and what is foreseen; give back the rest.

        ``busy``: requests wait, so nothing that could take them is given back.
        """
        if not busy:
            self._short_since = None
        idle = self._idle(now, out)
        unpromised = self._unpromised(now)
        least = max(self._pool.limits.min_gpus, 0 if self.contended else self.foreseen)
        spares = 0 if self.contended else self._config.spare_gpus
        grace_s = 0.0 if self.contended else self._config.idle_grace_s
        while self.can_grow(now) and (self.total() < least or len(idle) + unpromised < spares):
            self._acquire(now, out, "minimum" if self.total() < least else "spare")
            unpromised += 1
        # Until then, one that is needed again would have to start anew: dearer than to let it come.
        patience_s = 0.0 if self.contended else max(grace_s, self.startup_s)
        self._withdraw(now, len(idle) + unpromised - spares, least, patience_s, out)
        if busy:
            return
        idle.sort(key=lambda g: (self._pool.by_node.get(g.node, 0), g.idle_since, -g.slot))
        unpromised = self._unpromised(now)
        surplus = min(len(idle) + unpromised - spares, self.total() - least)
        for gpu in idle[: max(0, surplus)]:
            assert gpu.idle_since is not None
            if now - gpu.idle_since >= grace_s:
                self._release(gpu, out)

    def _unpromised(self, now: float) -> int:
        """Starting GPUs that nothing waits for."""
        count = 0
        for starting in self.starting:
            if starting.promised:
                starting.needless_since = None
                continue
            count += 1
            if starting.needless_since is None:
                starting.needless_since = now
        return count

    def _withdraw(
        self, now: float, surplus: int, least: int, patience_s: float, out: list[Decision]
    ) -> None:
        """Those that start and have been needless for ``patience_s`` need not come. One that wakes
        is there sooner than it could be stopped."""
        for starting in reversed(self.starting.copy()):
            if self.total() <= least:
                starting.needless_since = now  # the minimum needs it
                continue
            since = starting.needless_since
            if surplus <= 0 or since is None or starting.wakes or now - since < patience_s:
                continue
            self.starting.remove(starting)
            self._filling = 0
            surplus -= 1
            out.append(WithdrawGpu(self._pool.model))

    def release_emptied(self, busy: bool, out: list[Decision]) -> None:
        """GPUs that have just become empty and need not wait for the next tick."""
        limits, config = self._pool.limits, self._config
        for gpu in list(self._pool.emptied):
            kept = config.idle_grace_s or config.spare_gpus or config.forecast
            surplus = not busy and (self.contended or not kept)
            surplus = surplus and self.total() > limits.min_gpus and gpu.state == "ready"
            if gpu.empty and (surplus or gpu.state in ("draining", "yielding")):
                self._release(gpu, out)
        self._pool.emptied.clear()

    def _idle(self, now: float, out: list[Decision]) -> list[Gpu]:
        """Empty GPUs that take requests. Those that the operator empties go at once."""
        idle = []
        for gpu in list(self._pool.gpus.values()):
            if not gpu.empty:
                gpu.idle_since = None
                continue
            if gpu.idle_since is None:
                gpu.idle_since = now
            if gpu.state in ("draining", "yielding"):
                self._release(gpu, out)
            elif gpu.state == "ready":
                idle.append(gpu)
        return idle

    def _release(self, gpu: Gpu, out: list[Decision]) -> None:
        lasting = gpu.state != "draining" and gpu not in self._pool.outdated
        sleep = lasting and len(self.asleep) < self._config.max_asleep
        self._pool.remove(gpu)
        self._released(gpu)
        if sleep:
            self.asleep[gpu.id] = None
        out.append(ReleaseGpu(gpu.id, sleep))
