"""A replica without a model, for measuring all that is around one.

The engine is the real one: queues, blocks, prefix cache, batches, deltas. Only the forward and the
sampler are left out: each step takes a fixed time and every sequence gets the next token of one
text, so that tokens turn into words as they do with a model.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mell_ray.config import MellConfig
from mell_ray.serving.fleet import Fleet, actor_class
from mell_ray.serving.replica import GPUReplica
from mell_ray.serving.router import Router

if TYPE_CHECKING:
    from mell_ray.engine import Engine

STEP_S = 0.020  # a decode step of a large model with 64 sequences
TEXT = (
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their "
    "residence was at Norland Park, in the centre of their property, where, for many "
    "generations, they had lived in so respectable a manner as to engage the general good "
    "opinion of their surrounding acquaintance. "
)


def make_null_engine(llm: Any, device: str) -> Engine:
    """An engine with the tokenizer and limits of ``llm``'s model."""
    from mell_ray.engine import Engine, load_model
    from mell_ray.engine.sampler import Sampled
    from mell_ray.engine.types import StepOutput
    from mell_ray.serving.model_source import load_tokenizer, resolve_source

    text = load_tokenizer(llm).encode(TEXT, add_special_tokens=False)

    class Drawn:
        def __init__(self, tokens: list[int]) -> None:
            self._tokens = tokens

        def results(self) -> list[Sampled]:
            return [Sampled(token) for token in self._tokens]

    class NullEngine(Engine):
        num_tokens = 0
        step_cpu_s = 0.0  # of the engine thread, within ``step``

        def step(self) -> StepOutput:
            started, cpu = time.perf_counter(), time.thread_time()
            output = super().step()
            self.num_tokens += sum(len(delta.token_ids) for delta in output.deltas)
            self.step_cpu_s += time.thread_time() - cpu
            time.sleep(max(0.0, started + STEP_S - time.perf_counter()))
            return replace(output, seconds=time.perf_counter() - started)

        def _run(self, batch: Any, num_seqs: int) -> tuple[Any, Any]:
            del num_seqs
            drawn = Drawn([text[seq.num_tokens % len(text)] for seq in batch.sampled])
            return batch.sampled, drawn

    model = load_model(resolve_source(llm), llm.engine_kwargs, device)
    return NullEngine(model, llm.engine_kwargs, device)


class NullReplica(GPUReplica):
    """A replica with a null engine."""

    def _make_engine(self) -> Engine:
        return make_null_engine(self._spec.llm, self._spec.device)

    async def counters(self) -> tuple[int, float]:
        """Tokens handed out so far, and the CPU seconds of the engine's own steps."""
        engine: Any = self._engine
        return engine.num_tokens, engine.step_cpu_s


class NullRouter(Router):
    """A Router whose replicas are null replicas."""

    async def __init__(self, config: MellConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        Fleet.replica_class = actor_class(NullReplica)
        await super().__init__(config)
