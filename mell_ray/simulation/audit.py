"""An independent check of an event log against its trace.

Shares no code with the simulation: it knows only the log's format and re-counts everything from
it. What must hold, after every line:

* times never go back, and no request is placed before it arrives;
* no GPU holds more than its capacity, and only GPUs that are open hold anything;
* a request is on at most one GPU, never shrinks and never passes prompt + output;
* every request of the trace finishes exactly once, holding prompt + output tokens, unless it is
  larger than every GPU that was ever opened;
* a GPU that closes is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mell_ray.simulation.types import TraceRow

_TOLERANCE_S = 1e-6  # times in the log are rounded to microseconds
_FIELDS = {
    "gpu_open": ("gpu", "capacity_tokens"),
    "gpu_close": ("gpu",),
    "place": ("request", "gpu", "tokens"),
    "grow": ("request", "tokens"),
    "migrate": ("request", "src", "dst", "tokens"),
    "preempt": ("request",),
    "finish": ("request", "gpu", "tokens"),
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule; ``line`` is the log's line from 1, 0 for what only the end shows."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else f"at the end: {self.message}"


@dataclass(slots=True)
class AuditReport:
    """What an audit found. ``violations`` are the first ones; ``num_violations`` counts all."""

    lines: int = 0
    finished: int = 0
    too_large: int = 0  # requests that fit no GPU of the log, rightly not finished
    migrations: int = 0
    migrated_tokens: int = 0
    preemptions: int = 0
    peak_gpus: int = 0
    gpu_seconds: float = 0.0  # of open GPUs; those still open count to the last line
    num_violations: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.num_violations == 0


@dataclass(slots=True)
class _Gpu:
    capacity: int
    opened: float
    used: int = 0
    requests: int = 0


@dataclass(slots=True)
class _Request:
    gpu: Any = None  # where it is; None: nowhere
    tokens: int = 0
    finished: bool = False


class Auditor:
    """Takes a log's events one by one; `report` is complete after `close`."""

    def __init__(self, rows: Sequence[TraceRow], *, max_violations: int = 20) -> None:
        self.report = AuditReport()
        self._rows = {row.request: row for row in rows}
        self._max = max_violations
        self._gpus: dict[Any, _Gpu] = {}
        self._requests: dict[int, _Request] = {}
        self._largest_gpu = 0
        self._t = 0.0
        self._line = 0

    def feed(self, line: int, event: dict[str, Any]) -> None:
        """Check one event. After a violation the books follow the log as far as they can."""
        self._line = line
        self.report.lines += 1
        kind, t = event.get("event"), event.get("t")
        if kind not in _FIELDS:
            return self._wrong(f"unknown event {kind!r}")
        missing = [name for name in _FIELDS[kind] if name not in event]
        if missing:
            return self._wrong(f"{kind} has no {', '.join(missing)}")
        odd = [n for n in ("request", "tokens") if not isinstance(event.get(n, 0), int)]
        odd += [n for n in ("gpu", "src", "dst") if not isinstance(event.get(n, ""), (str, int))]
        if odd:
            return self._wrong(f"{kind} has a wrong {odd[0]}: {event[odd[0]]!r}")
        if not isinstance(t, (int, float)) or not abs(t) < float("inf"):
            return self._wrong(f"{kind} has no time, t = {t!r}")
        if t < self._t:
            self._wrong(f"time goes back from {self._t} to {t}")
        self._t = max(self._t, t)
        if kind in ("gpu_open", "gpu_close"):
            (self._open if kind == "gpu_open" else self._close)(event)
        elif event["request"] not in self._rows:
            self._wrong(f"{kind} of request {event['request']!r}, which the trace does not have")
        else:
            request = self._requests.setdefault(event["request"], _Request())
            getattr(self, f"_{kind}")(event, request, self._rows[event["request"]])
        return None

    def close(self) -> AuditReport:
        """Check what only the end shows, and return the report."""
        self._line = 0
        for number, row in self._rows.items():
            request = self._requests.get(number)
            if request is not None and request.finished:
                continue
            if request is None and row.prompt_tokens + row.output_tokens > self._largest_gpu > 0:
                self.report.too_large += 1
            else:
                self._wrong(f"request {number} never finished")
        for gpu in self._gpus.values():
            self.report.gpu_seconds += self._t - gpu.opened
        return self.report

    def _wrong(self, message: str) -> None:
        self.report.num_violations += 1
        if len(self.report.violations) < self._max:
            self.report.violations.append(Violation(self._line, message))

    def _open(self, event: dict[str, Any]) -> None:
        name, capacity = event["gpu"], event["capacity_tokens"]
        if name in self._gpus:
            return self._wrong(f"GPU {name} is opened twice")
        if not isinstance(capacity, int) or capacity <= 0:
            return self._wrong(f"GPU {name} has capacity {capacity!r}")
        self._gpus[name] = _Gpu(capacity, self._t)
        self._largest_gpu = max(self._largest_gpu, capacity)
        self.report.peak_gpus = max(self.report.peak_gpus, len(self._gpus))
        return None

    def _close(self, event: dict[str, Any]) -> None:
        gpu = self._gpus.pop(event["gpu"], None)
        if gpu is None:
            return self._wrong(f"GPU {event['gpu']} is closed and was not open")
        self.report.gpu_seconds += self._t - gpu.opened
        if gpu.requests:
            self._wrong(f"GPU {event['gpu']} is closed with {gpu.requests} requests on it")
        return None

    def _place(self, event: dict[str, Any], request: _Request, row: TraceRow) -> None:
        number = event["request"]
        if request.finished:
            self._wrong(f"request {number} is placed after it finished")
        if request.gpu is not None:
            self._wrong(f"request {number} is placed while on GPU {request.gpu}")
            self._take_off(request)
        if self._t < row.arrival_s - _TOLERANCE_S:
            self._wrong(f"request {number} is placed at {self._t}, arrives at {row.arrival_s}")
        if event["tokens"] < row.prompt_tokens:
            self._wrong(f"request {number} is placed with less than its prompt")
        self._put_on(event, event["gpu"], request, row)

    def _grow(self, event: dict[str, Any], request: _Request, row: TraceRow) -> None:
        if request.gpu is None:
            return self._wrong(f"request {event['request']} grows and is on no GPU")
        if event.get("gpu", request.gpu) != request.gpu:
            self._wrong(f"request {event['request']} grows on {event['gpu']}, is on {request.gpu}")
        gpu = request.gpu
        self._take_off(request)
        return self._put_on(event, gpu, request, row)

    def _migrate(self, event: dict[str, Any], request: _Request, row: TraceRow) -> None:
        number = event["request"]
        if request.gpu is None or request.gpu != event["src"]:
            self._wrong(f"request {number} leaves GPU {event['src']}, is on {request.gpu}")
        if event["src"] == event["dst"]:
            self._wrong(f"request {number} migrates to where it is")
        if request.gpu is not None:
            self._take_off(request)
        self.report.migrations += 1
        self.report.migrated_tokens += event["tokens"]
        self._put_on(event, event["dst"], request, row)

    def _preempt(self, event: dict[str, Any], request: _Request, row: TraceRow) -> None:  # noqa: ARG002
        if request.gpu is None:
            return self._wrong(f"request {event['request']} is preempted and is on no GPU")
        self.report.preemptions += 1
        return self._take_off(request)

    def _finish(self, event: dict[str, Any], request: _Request, row: TraceRow) -> None:
        number, total = event["request"], row.prompt_tokens + row.output_tokens
        if request.finished:
            self._wrong(f"request {number} finishes twice")
        if request.gpu is None or request.gpu != event["gpu"]:
            self._wrong(f"request {number} finishes on GPU {event['gpu']}, is on {request.gpu}")
        if event["tokens"] != total:
            self._wrong(f"request {number} finishes with {event['tokens']} tokens, not {total}")
        if request.gpu is not None:
            # Its last tokens were KV too: they must have fitted before they were freed.
            gpu = request.gpu
            self._take_off(request)
            self._put_on(event, gpu, request, row)
            self._take_off(request)
        request.finished = True
        self.report.finished += 1

    def _put_on(self, event: dict[str, Any], name: Any, request: _Request, row: TraceRow) -> None:
        number, tokens = event["request"], event["tokens"]
        if tokens < request.tokens:
            self._wrong(f"request {number} shrinks from {request.tokens} to {tokens} tokens")
        if tokens > row.prompt_tokens + row.output_tokens:
            self._wrong(f"request {number} holds {tokens} tokens, more than prompt + output")
        gpu = self._gpus.get(name)
        if gpu is None:
            return self._wrong(f"request {number} is on GPU {name}, which is not open")
        request.gpu, request.tokens = name, tokens
        gpu.used += tokens
        gpu.requests += 1
        if gpu.used > gpu.capacity:
            self._wrong(f"GPU {name} holds {gpu.used} tokens, more than its {gpu.capacity}")
        return None

    def _take_off(self, request: _Request) -> None:
        gpu = self._gpus.get(request.gpu)
        if gpu is not None:
            gpu.used -= request.tokens
            gpu.requests -= 1
        request.gpu = None


def audit(
    rows: Sequence[TraceRow],
    events: Iterable[tuple[int, dict[str, Any]]],
    *,
    max_violations: int = 20,
) -> AuditReport:
    """Check ``events``, as `read_events` yields them, against the trace they came from."""
    auditor = Auditor(rows, max_violations=max_violations)
    for line, event in events:
        auditor.feed(line, event)
    return auditor.close()
