"""The nouns of the engine: what goes in, what comes out, what travels in a migration.

Free of torch and Ray; picklable. Each field says who writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
SeqStatus = Literal["waiting", "running", "frozen", "reserved"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Set once by the ingress, validated there, never changed.

    ``seed`` is always a concrete number, so that a token drawn at a position is the same on
    whichever replica draws it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # alternatives per position; 0: only the sampled token's
    grammar: str | None = None  # what the output must follow, in llguidance's form


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, of the raw logits (before temperature)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first, ties by id


@dataclass(slots=True)
class RequestState:
    """All that defines a request; enough to continue it on any replica.

    ``num_computed`` is the one progress number: how many leading tokens have valid KV. A new
    request, a recovered one and a token migration have 0; a KV migration has what was sent.
    """

    request_id: str  # ingress
    prompt_token_ids: list[int]  # ingress
    sampling: SamplingParams  # ingress
    arrival_s: float = 0.0  # Router, wall clock at admission: age for preemption
    priority: int = 0  # ingress; higher goes first
    generation: int = 0  # Router at admission, +1 at every hand-over
    output_token_ids: list[int] = field(default_factory=list)  # engine
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)  # engine, if asked for
    num_computed: int = 0  # engine
    ingress_id: str = ""  # ingress: whose stream gets the deltas
    migrations: int = 0  # engine at hand-over: how often it has moved
    kv_format: str = ""  # engine that owns it: what its blocks hold; "" before any engine
    traceparent: str = ""  # ingress: W3C context of its span; "": not traced

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(slots=True)
class TokenDelta:
    """New output tokens of one request; at most one per request and step.

    ``index`` is the position of the first token among the request's output tokens, so a receiver
    can order deltas and drop what it already has.
    """

    request_id: str
    generation: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None  # message for a person, with finish_reason "error"


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step produced and what it cost."""

    deltas: list[TokenDelta]
    num_decode_tokens: int
    num_prefill_tokens: int
    num_resident_tokens: int  # KV tokens attended over in this step
    num_preempted: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """One line of a replica's report."""

    request_id: str
    generation: int
    status: SeqStatus
    num_tokens: int
    num_computed: int
    num_blocks: int
    priority: int
    migrations: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A replica's pool and queues at one moment. Blocks exclude the padding block."""

    capacity_blocks: int
    used_blocks: int  # held by requests or reservations; cached-but-free blocks do not count
    cached_blocks: int  # free blocks whose prefix hash is still known
    running: int
    waiting: int
    prefix_hit_tokens: int  # of those, found in the cache; total since start
    prefix_query_tokens: int  # looked up, at each admission or reservation; total since start
    prefix_evictions: int  # cached blocks given to somebody else; total since start
    preemptions: int  # total since start


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a migration target holds for a request that it does not own yet."""

    request_id: str
    num_cached_tokens: int  # leading tokens the target's prefix cache already has
    num_blocks: int
