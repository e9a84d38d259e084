"""What travels between ingress, replica, Router and Migrator.

Token deltas are the only hot message: one stream item per engine step and ingress, holding plain
tuples, because pickling a tuple costs a fraction of pickling a dataclass.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mell_ray.config import LLMConfig, MigrationConfig, TracingConfig
from mell_ray.engine.types import (
    EngineStats,
    FinishReason,
    SequenceInfo,
    TokenDelta,
    TokenLogprobs,
)
from mell_ray.migration.transports.base import OBJECTS, Endpoint, TransportName

# lent: asleep, and somebody else has its slot.
ReplicaState = Literal["starting", "ready", "draining", "asleep", "lent"]
# busy: a request is there; unable: its weights are nowhere from which they could come back.
SleepOutcome = Literal["asleep", "busy", "unable"]

# (request id, generation, index, token ids, logprobs, finish reason, error)
WireDelta = tuple[str, int, int, list[int], list[Any] | None, FinishReason | None, str | None]


@dataclass(frozen=True, slots=True)
class Migrating:
    """The source is about to move the request: the ingress connects to ``dst`` in advance."""

    request_id: str
    dst: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The source has handed the request over to ``dst``."""

    request_id: str
    dst: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """The replica gave the request up; the ingress asks the Router for another place."""

    request_id: str
    generation: int


@dataclass(slots=True)
class StreamItem:
    """One item of a stream. Without deltas and notices it is a heartbeat."""

    deltas: list[WireDelta] = field(default_factory=list)
    notices: list[Migrating | Moved | Evicted] = field(default_factory=list)


_NOTICES = {kind.__name__: kind for kind in (Migrating, Moved, Evicted)}


def encode_item(item: StreamItem) -> bytes:
    """One line of JSON."""
    notices = [
        (type(notice).__name__, *(getattr(notice, name) for name in notice.__slots__))
        for notice in item.notices
    ]
    return json.dumps((item.deltas, notices), separators=(",", ":")).encode() + b"\n"


def decode_item(line: bytes) -> StreamItem:
    """What ``encode_item`` made; deltas are lists instead of tuples, of the same order."""
    deltas, notices = json.loads(line)
    return StreamItem(deltas, [_NOTICES[kind](*fields) for kind, *fields in notices])


def encode_delta(delta: TokenDelta) -> WireDelta:
    logprobs = [(item.logprob, item.top) for item in delta.logprobs or ()]
    return (
        delta.request_id,
        delta.generation,
        delta.index,
        delta.token_ids,
        logprobs or None,
        delta.finish_reason,
        delta.error,
    )


def decode_logprobs(logprobs: list[Any] | None) -> list[TokenLogprobs] | None:
    return logprobs and [
        TokenLogprobs(logprob, tuple(map(tuple, top))) for logprob, top in logprobs
    ]


@dataclass(frozen=True, slots=True)
class Slot:
    """An accelerator that is held apart from the replica that runs on it. ``devices``: of the
    node's GPUs, as CUDA_VISIBLE_DEVICES says it; empty on a CPU."""

    node_id: str
    devices: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """Everything a replica is told at birth."""

    replica_id: str
    namespace: str
    device: str  # "cuda" or "cpu"
    llm: LLMConfig
    migration: MigrationConfig
    lease_s: float
    ingress_timeout_s: float
    config_hash: str
    share_weights: bool
    slot: Slot | None  # where it is held apart from it
    log_level: str
    tracing: TracingConfig


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica that is ready or asleep. Sizes in blocks, bytes and tokens."""

    replica_id: str
    model_id: str
    node_id: str
    pid: int
    device: str
    kernels: str  # whose code runs its layers: "triton", "compiled" or "torch"
    capacity_blocks: int
    block_size: int
    block_nbytes: int
    max_model_len: int
    max_num_seqs: int
    config_hash: str
    weights: str  # identifies them
    kv_format: str  # what the bytes of a block mean
    gpu_uuid: str = ""  # of the physical GPU
    devices: str = ""  # CUDA_VISIBLE_DEVICES, where its GPU is held apart from it
    asleep: bool = False
    lends: bool = False  # its slot is held apart from it, so that it can be lent
    transports: tuple[TransportName, ...] = (OBJECTS,)  # by which blocks can reach it
    attention_doubles_at: float = math.inf  # see ``GpuReady``

    def endpoint(self) -> Endpoint:
        """Where it is, for the choice of a transport."""
        return Endpoint(self.replica_id, self.node_id, self.device, self.gpu_uuid, self.transports)


@dataclass(frozen=True, slots=True)
class StepSample:
    """One recent engine step, for the Router's step-time model."""

    sequences: int
    resident_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica's answer to the Router's poll."""

    replica_id: str
    stats: EngineStats
    sequences: list[SequenceInfo]
    step: StepSample | None
    retired: bool
    # (request id, generation) of what ended or was dropped here since the report before, which a
    # short request may never have stood in.
    ended: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """Where a request lives. ``existing``: it is already there; attach, do not submit."""

    replica_id: str
    generation: int
    arrival_s: float
    existing: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Whose request it is, where waiting requests are placed by fair shares, and the weight of
    the share."""

    tenant: str = ""  # "": all who call without a key
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """What the Router must know to place a request. Lengths in tokens."""

    request_id: str
    ingress_id: str
    model_id: str
    num_tokens: int
    max_total_tokens: int
    priority: int = 0
    generation: int = 0  # the highest the ingress has seen; 0: new
    arrival_s: float = 0.0  # 0: now
    lost_replica: str | None = None  # the owner that failed, when this is a recovery
    traceparent: str = ""  # W3C context of the request's span; "": not traced
    prefix: tuple[bytes, ...] = ()  # chained hashes of its first full blocks, for placement
    share: Share | None = None  # None: places are not shared
