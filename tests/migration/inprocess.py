"""Two engines in one process, joined by the same protocol as two replicas, without Ray."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, load_model
from mell_ray.engine.loop import EngineLoop
from mell_ray.engine.types import RequestState, SamplingParams, StepOutput
from mell_ray.migration.peers import PeerDied
from mell_ray.migration.source import MigrationSource
from mell_ray.migration.target import MigrationTarget
from mell_ray.migration.transports.objects import ObjectTransport
from mell_ray.migration.types import Committed, Frozen, Received
from mell_ray.serving.track import Track
from mell_ray.serving.wire import encode_delta


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.0,
    logprobs: int | None = None,
) -> RequestState:
    return RequestState(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=11,
            ignore_eos=True,
            logprobs=logprobs,
        ),
        generation=1,
        ingress_id="test",
    )


@dataclass
class Faults:
    """What goes wrong on purpose: called with the name of each message to the target."""

    before: Callable[[str], None] = lambda _: None
    after: Callable[[str], None] = lambda _: None


class Tracks(dict[str, Track]):
    """What a client reads of each request, shared by the nodes.

    A test may keep the last tokens of a request back until ``let_go``: it then outlives what
    happens beside it, however long that takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stops: dict[str, int] = {}

    def keep_back(self, state: RequestState, tokens: int) -> None:
        stop = state.sampling.max_tokens - tokens
        self._stops = {**self._stops, state.request_id: stop}  # engines' threads read it

    def let_go(self) -> None:
        self._stops = {}

    def kept_back(self) -> list[str]:
        """Requests that have come as far as they may."""
        stops = self._stops.items()
        return [name for name, stop in stops if len(self[name].token_ids) >= stop]


@dataclass
class Node:
    """One replica: an engine in its thread and the protocol's two halves."""

    name: str
    tracks: Tracks
    config: EngineConfig = field(default_factory=EngineConfig)
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        model = load_model(tiny_llama(), self.config)
        self.engine = Engine(model, self.config)
        self.engine.has_work = self._has_work  # type: ignore[method-assign]
        self.loop = EngineLoop(self.engine, self._on_step, lambda: None)
        self.source = MigrationSource(self.timeout_s)
        self.target = MigrationTarget(self.timeout_s)
        self.transports: dict[str, Any] = {"objects": ObjectTransport()}
        self.loop.start()

    def _on_step(self, output: StepOutput) -> None:
        for delta in output.deltas:
            self.tracks[delta.request_id].accept(self.name, encode_delta(delta))

    def _has_work(self) -> bool:
        """An engine that has a request which is kept back does nothing but answer calls."""
        owned = [n for n in self.tracks.kept_back() if self.engine.generation_of(n) is not None]
        return not owned and Engine.has_work(self.engine)

    async def call(self, function):
        return await asyncio.wrap_future(self.loop.call(function))

    async def submit(self, state: RequestState, keep: int = 0) -> None:
        """``keep``: so many tokens come only once the tracks let them go."""
        self.tracks[state.request_id] = Track(state.request_id, self.name, state.generation)
        if keep:
            self.tracks.keep_back(state, keep)
        await self.call(lambda e: e.add(state))

    def stop(self) -> None:
        self.loop.stop()


# By migration, as long as somebody has them.
SOURCES: weakref.WeakValueDictionary[str, SourceEnd] = weakref.WeakValueDictionary()


class SourceEnd:
    """The driver's view of a node as a source."""

    def __init__(self, node: Node, faults: Faults | None = None) -> None:
        self._node = node
        self._faults = faults or Faults()

    async def begin(self, order):
        SOURCES[order.migration_id] = self
        return await self._node.call(lambda e: self._node.source.begin(e, order))

    async def offer(self, transport, peer):
        return self._node.transports[transport].offer(peer)

    async def join(self, transport, peer, ticket):
        await self._node.transports[transport].join(peer, ticket, is_source=True, timeout_s=60)

    async def abort_link(self, transport, peer):
        self._node.transports[transport].abort(peer)

    def stage(self, migration_id, first_block, max_blocks, transport):
        node = self._node

        def gather(engine):
            meta = node.source.ready(engine, migration_id, first_block, max_blocks)
            data = np.empty(meta.nbytes, np.uint8)
            if meta.num_blocks:
                node.source.copy_out(engine, migration_id, first_block, meta.num_blocks, data)
            return meta, data

        async def act():
            self._faults.before("stage")
            meta, data = await node.call(gather)
            parcel = await node.transports[transport].send_blocks("peer", data, 60)
            self._faults.after("stage")
            return meta, parcel

        both = asyncio.ensure_future(act())
        return _part(both, 0), _part(both, 1)

    async def tokens(self, migration_id, start):
        return await self._node.call(lambda e: self._node.source.tokens(e, migration_id, start))

    def freeze(self, migration_id, first_block):
        async def act():
            self._faults.before("freeze")
            result = await self._node.call(
                lambda e: self._node.source.freeze(e, migration_id, first_block)
            )
            self._faults.after("freeze")
            return result

        both = asyncio.ensure_future(act())
        return _part(both, 0), _part(both, 0), _part(both, 1)

    async def thaw(self, order):
        def thaw(engine):
            self._node.source.thaw(engine, order.migration_id)
            return engine.generation_of(order.request_id) is not None

        return await self._node.call(thaw)

    async def release(self, migration_id):
        order = await self._node.call(lambda e: self._node.source.release(e, migration_id))
        if order is not None:
            self._node.tracks[order.request_id].follow(order.src, order.dst)
        return 0.0


class TargetEnd:
    """The driver's view of a node as a target. It finds the source of a migration by itself."""

    def __init__(self, node: Node, faults: Faults | None = None) -> None:
        self._node = node
        self._faults = faults or Faults()

    async def _do(self, name, function):
        self._faults.before(name)
        result = await self._node.call(function)
        self._faults.after(name)
        return result

    async def reserve(self, order, state):
        return await self._do("reserve", lambda e: self._node.target.reserve(e, order, state))

    async def join(self, transport, peer, ticket):
        await self._node.transports[transport].join(peer, ticket, is_source=False, timeout_s=60)

    async def abort_link(self, transport, peer):
        self._node.transports[transport].abort(peer)

    async def receive(self, migration_id, first_block, num_blocks, transport):
        source, target = SOURCES[migration_id], self._node.target
        meta, parcel = source.stage(migration_id, first_block, num_blocks, transport)
        meta = await meta
        if meta.num_blocks < num_blocks:
            return Received(meta)
        parcel = await parcel
        data = await self._node.transports[transport].recv_blocks("peer", parcel, 60)

        def scatter(engine):
            target.receive(engine, migration_id, first_block, data)
            return target.progress(engine, migration_id)

        return Received(meta, await self._do("receive", scatter))

    async def extend(self, migration_id, tail):
        await self._do("extend", lambda e: self._node.target.extend(e, migration_id, tail))

    async def wait_progress(self, migration_id, num_tokens):
        while True:
            have = await self._do("progress", lambda e: self._node.target.progress(e, migration_id))
            if have >= num_tokens - 1:
                return have
            await asyncio.sleep(0.001)

    async def commit(self, migration_id, frozen, payload):
        state: Frozen = await frozen
        data: np.ndarray = await payload
        generation = await self._do(
            "commit", lambda e: self._node.target.commit(e, migration_id, state, data)
        )
        return Committed(generation)

    async def settle(self, migration_id):
        return await self._do("settle", lambda e: self._node.target.settle(e, migration_id))


class DeadEnd(TargetEnd):
    """A target that dies when it gets the message ``at``; nothing sent later arrives."""

    def __init__(self, node: Node, at: str) -> None:
        super().__init__(node)
        self._at = at
        self._dead = False

    async def _do(self, name, function):
        if name == self._at:
            self._dead = True
        if self._dead:
            raise PeerDied("the target was killed")
        return await super()._do(name, function)


def _part(future, index):
    async def get():
        return (await asyncio.shield(future))[index]

    part = asyncio.ensure_future(get())
    part.add_done_callback(lambda done: done.cancelled() or done.exception())  # as Ray: no noise
    return part
