"""How many events a second the scheduler handles in one process, beside a plain best fit.

    python load_tests/scheduler_throughput.py

A fleet in steady state: requests arrive, grow 16 tokens an epoch, end; migrations end at once. Only
the scheduler's own processor time counts. Two counts are printed: *events* are arrivals, ends, ends
of migrations, GPUs and ticks (one growth report an epoch counts as one event, although it is much
of the work); *with growth* counts each request's growth in a report as well. The plain best fit
keeps one sorted list of free room, updates it for every arrival, end and growth, and decides
nothing else: what the books alone cost in this language on this machine. Every figure is from the
fastest of ``--rounds`` runs (what else the machine does only adds time), the slowest stands beside.
"""

from __future__ import annotations

import argparse
import time
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from random import Random

from mell_ray.scheduler import ModelLimits, Scheduler, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireGpu,
    Arrive,
    Event,
    Finish,
    GpuReady,
    Grow,
    Migrate,
    MigrationDone,
    Tick,
)

CAPACITY = 60_000
STEP = 16

_Run = tuple[float, float, int, float]


@dataclass
class Load:
    """Requests of a chat service: lognormal prompts, exponential outputs; deterministic."""

    live: int
    rng: Random = field(default_factory=lambda: Random(7))
    mean_output: float = 320.0
    sizes: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    made: int = 0

    def arrive(self) -> tuple[str, int]:
        name = f"r{self.made}"
        self.made += 1
        size = min(int(self.rng.lognormvariate(6.6, 0.9)) + 16, CAPACITY // 3)
        self.sizes[name] = size
        self.left[name] = int(self.rng.expovariate(1 / self.mean_output)) + 1
        return name, size

    def step(self) -> list[str]:
        """Everyone grows; returns who is done."""
        ended = []
        for name in self.sizes:
            self.left[name] -= STEP
            if self.left[name] <= 0:
                ended.append(name)
            else:
                self.sizes[name] += STEP
        for name in ended:
            del self.sizes[name], self.left[name]
        return ended


class Driver:
    """Runs the scheduler and times it."""

    def __init__(self, policy: str, price: float) -> None:
        limits = ModelLimits(0, 1 << 20, CAPACITY)
        self.scheduler = Scheduler(
            SchedulerConfig(
                models={"m": limits},
                policy=policy,
                growth_per_tick=STEP,
                tokens_per_unit=1,
                idle_grace_s=0.0,
                migration_price=price,
            )
        )
        self.now = 0.0
        self.seconds = 0.0
        self.events = 0
        self.growth = 0
        self.gpus = 0

    def send(self, events: list[Event]) -> None:
        handle, now = self.scheduler.handle, self.now
        while events:
            answers = []
            begin = time.process_time()
            for event in events:
                answers.append(handle(event, now))
            self.seconds += time.process_time() - begin
            self.events += len(events)
            events = [e for decisions in answers for d in decisions if (e := self._ends(d))]

    def _ends(self, decision: object) -> Event | None:
        if isinstance(decision, Migrate):
            d = decision
            return MigrationDone(d.request, d.src, d.dst, d.mode, 1000, 1 << 20, 0.05)
        if isinstance(decision, AcquireGpu):
            self.gpus += 1
            return GpuReady(f"g{self.gpus}", "m", CAPACITY)
        return None

    def epoch(self, load: Load) -> None:
        self.now += STEP / 30
        ended = load.step()
        self.send([Finish(name) for name in ended])
        self.send([Grow(load.sizes)])
        self.growth += len(load.sizes)
        fresh = [load.arrive() for _ in range(load.live - len(load.sizes))]
        self.send([Arrive(name, "m", size, CAPACITY) for name, size in fresh])
        self.send([Tick()])

    def reset(self) -> None:
        self.seconds, self.events, self.growth = 0.0, 0, 0


def measure(policy: str, live: int, epochs: int, price: float) -> _Run:
    """(events a second, with growth a second, GPUs used, milliseconds an epoch)."""
    driver, load = Driver(policy, price), Load(live)
    for _ in range(max(10, epochs // 4)):
        driver.epoch(load)
    driver.reset()
    for _ in range(epochs):
        driver.epoch(load)
    used = sum(1 for view in driver.scheduler.gpus() if view.requests)
    seconds = driver.seconds
    return (
        driver.events / seconds,
        (driver.events + driver.growth) / seconds,
        used,
        1000 * seconds / epochs,
    )


def plain_best_fit(live: int, epochs: int) -> _Run:
    """Best fit over one sorted list of (room, GPU), nothing else."""
    load = Load(live)
    rooms: list[tuple[int, int]] = []
    room: dict[int, int] = {}
    where: dict[str, int] = {}
    need: dict[str, int] = {}
    seconds, events, growth, gpus = 0.0, 0, 0, 0

    def change(gpu: int, by: int) -> None:
        old = room[gpu]
        del rooms[bisect_left(rooms, (old, gpu))]
        room[gpu] = old + by
        insort(rooms, (old + by, gpu))

    for epoch in range(epochs + max(10, epochs // 4)):
        if epoch == max(10, epochs // 4):
            seconds, events, growth = 0.0, 0, 0
        ended = load.step()
        begin = time.process_time()
        for name in ended:
            change(where.pop(name), need.pop(name))
        for name, size in load.sizes.items():
            change(where[name], need[name] - size - STEP)
            need[name] = size + STEP
        seconds += time.process_time() - begin
        events += len(ended)
        growth += len(load.sizes)
        for name, size in [load.arrive() for _ in range(live - len(load.sizes))]:
            begin = time.process_time()
            position = bisect_left(rooms, (size + STEP, -1))
            if position == len(rooms):
                gpus += 1
                room[gpus] = CAPACITY
                insort(rooms, (CAPACITY, gpus))
                position = len(rooms) - 1
            where[name], need[name] = rooms[position][1], size + STEP
            change(where[name], -need[name])
            seconds += time.process_time() - begin
            events += 1
    used = sum(1 for value in room.values() if value < CAPACITY)
    return events / seconds, (events + growth) / seconds, used, 1000 * seconds / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", default="tide,mell,best-fit")
    parser.add_argument("--small", type=int, default=1_200, help="live requests, about 30 GPUs")
    parser.add_argument("--large", type=int, default=40_000, help="live requests, about 1000 GPUs")
    parser.add_argument("--price", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[tuple[str, list[_Run], list[_Run]]] = []
    rounds = range(args.rounds)
    for policy in args.policies.split(","):
        small = sorted(measure(policy, args.small, 200, args.price) for _ in rounds)
        large = sorted(measure(policy, args.large, 20, args.price) for _ in rounds)
        rows.append((policy, small, large))
    small = sorted(plain_best_fit(args.small, 200) for _ in rounds)
    large = sorted(plain_best_fit(args.large, 20) for _ in rounds)
    rows.append(("plain best fit", small, large))
    head = "| GPUs | events/s | slowest | with growth | ms/epoch "
    print(f"| policy {head}{head}| factor |")
    print("|---" * 12 + "|")
    for name, small, large in rows:
        cells = [
            f"{gpus} | {events:,.0f} | {runs[0][0]:,.0f} | {growth:,.0f} | {ms:.2f}"
            for runs in (small, large)
            for events, growth, gpus, ms in runs[-1:]
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {small[-1][0] / large[-1][0]:.2f} |")


if __name__ == "__main__":
    main()
