"""Which spans there are, and what stands in them. Request ids, never request text.

A trace reads: ``chat`` or ``completion`` at the ingress; below it ``generate`` for each choice;
below that ``queue``, ``prefill`` and ``decode`` as the client saw them, ``engine`` for each stay on
a replica with its first ``engine.step`` spans, and ``migration`` with its ``freeze``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mell_ray.engine.types import RequestState, StepOutput
from mell_ray.migration.types import MigrationResult
from mell_ray.observability.clock import RequestClock
from mell_ray.observability.tracing import Attributes, Tracer, traceparent

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# A long answer takes thousands of steps; the first ones of a stay are where it may have waited.
MAX_STEP_SPANS = 64


class ChoiceSpan:
    """``generate``: one choice from its acceptance to its end. Without a tracer, or where the
    request is not sampled, nothing happens."""

    def __init__(
        self, tracer: Tracer | None, parent: str, request_id: str, model: str, prompt_tokens: int
    ) -> None:
        self._tracer = tracer
        self._span: Span | None = None
        self.traceparent = ""
        if tracer is not None and parent:
            attributes: Attributes = {
                "mell.request_id": request_id,
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": prompt_tokens,
            }
            self._span = tracer.start("generate", parent, attributes)
            self.traceparent = traceparent(self._span)

    def end(self, clock: RequestClock, outcome: str) -> None:
        """Write down what the clock has seen."""
        if self._span is None:
            return
        assert self._tracer is not None
        start = clock.accepted_wall - clock.accepted  # what turns the clock's times into wall time
        parts = (
            ("queue", clock.accepted, clock.placed_at),
            ("prefill", clock.placed_at, clock.first_token),
            ("decode", clock.first_token, clock.last_token),
        )
        for name, begin, end in parts:
            if begin is not None and end is not None:
                self._tracer.record(name, self.traceparent, start + begin, start + end)
        for stall in clock.stalls:
            details = {"mell.stall.kind": stall.kind, "mell.stall.seconds": stall.seconds}
            self._span.add_event("stall", details, int((start + stall.at) * 1e9))
        self._span.set_attributes(
            {
                "mell.outcome": outcome,
                "mell.migrations": clock.migrations,
                "mell.recoveries": clock.recoveries,
                "gen_ai.usage.output_tokens": clock.num_tokens,
            }
        )
        self._span.end()


@dataclass(slots=True)
class _Stay:
    span: Span
    traceparent: str
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0


class EngineSpans:
    """``engine`` and ``engine.step`` of one replica. All calls come from the engine thread."""

    def __init__(self, tracer: Tracer | None, replica_id: str) -> None:
        self._tracer = tracer
        self._replica_id = replica_id
        self._stays: dict[str, _Stay] = {}

    def arrived(self, state: RequestState) -> None:
        """The request is owned here from now on."""
        self.left(state.request_id, "replaced")
        if self._tracer is None or not state.traceparent:
            return
        attributes: Attributes = {
            "mell.replica": self._replica_id,
            "mell.request_id": state.request_id,
            "mell.generation": state.generation,
            "mell.kv_tokens_brought": state.num_computed,
        }
        span = self._tracer.start("engine", state.traceparent, attributes)
        self._stays[state.request_id] = _Stay(span, traceparent(span))

    def stepped(self, output: StepOutput) -> None:
        """The engine has made a step."""
        if not self._stays:
            return
        assert self._tracer is not None
        now = time.time()
        for delta in output.deltas:
            stay = self._stays.get(delta.request_id)
            if stay is None:
                continue
            stay.steps += 1
            stay.tokens += len(delta.token_ids)
            stay.step_seconds += output.seconds
            if stay.steps <= MAX_STEP_SPANS:
                attributes = {
                    "mell.decode_tokens": output.num_decode_tokens,
                    "mell.prefill_tokens": output.num_prefill_tokens,
                    "mell.resident_tokens": output.num_resident_tokens,
                    "mell.preempted": output.num_preempted,
                }
                self._tracer.record(
                    "engine.step", stay.traceparent, now - output.seconds, now, attributes
                )
            if delta.finish_reason is not None:
                self.left(delta.request_id, delta.finish_reason)

    def left(self, request_id: str, why: str) -> None:
        """The request ended here, or is owned elsewhere."""
        stay = self._stays.pop(request_id, None)
        if stay is None:
            return
        stay.span.set_attributes(
            {
                "mell.left": why,
                "mell.steps": stay.steps,
                "mell.tokens": stay.tokens,
                "mell.step_seconds": stay.step_seconds,
            }
        )
        stay.span.end()


def record_migration(tracer: Tracer | None, parent: str, result: MigrationResult) -> None:
    """``migration``, and below it the ``freeze`` that its client may have noticed."""
    if tracer is None or not parent:
        return
    order = result.order
    end = result.finished_at or time.time()
    above = tracer.record(
        "migration",
        parent,
        end - result.seconds,
        end,
        {
            "mell.request_id": order.request_id,
            "mell.migration.from": order.src,
            "mell.migration.to": order.dst,
            "mell.migration.mode": order.mode,
            "mell.migration.reason": order.reason,
            "mell.migration.outcome": result.outcome,
            "mell.migration.stages": result.stages,
            "mell.migration.bytes": result.bytes,
        },
    )
    if result.freeze_s > 0:
        tracer.record("freeze", above, end - result.freeze_s, end)
