"""The nouns of a replay: what is asked for, what becomes of each request, what it adds up to."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from mell_ray.errors import ConfigError

#: Token ids that every model of at least 4096 entries has, past the special ones at the start.
DEFAULT_TOKEN_IDS = (256, 4096)


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How a trace is turned into requests. Scales and limits apply to every request alike."""

    time_compression: float = 1.0  # arrivals come that many times faster
    seconds: float | None = None  # of the trace, from its first arrival; None: all of it
    scale_prompt: float = 1.0
    scale_output: float = 1.0
    max_prompt: int | None = None  # tokens; longer prompts are cut
    max_output: int | None = None
    token_ids: tuple[int, int] = DEFAULT_TOKEN_IDS  # prompts draw from [low, high)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_compression", "scale_prompt", "scale_output"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("seconds", "max_prompt", "max_output"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        low, high = self.token_ids
        if not 0 <= low < high:
            raise ConfigError(f"token_ids must be LOW:HIGH with 0 <= LOW < HIGH, not {low}:{high}")


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    number: int  # of its row in the trace
    at_s: float  # after the start of the replay
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[str, ...] = ()  # each stands for `prefix_block` tokens of the prompt
    prefix_block: int = 512  # tokens, after scaling


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. ``kind`` is equal for failures that differ in numbers only."""

    kind: str
    message: str


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds after the start of the replay."""

    job: Job
    sent_s: float  # when it was sent; later than ``job.at_s`` where this client was busy
    first_s: float | None = None  # first piece of the answer
    last_s: float | None = None  # last piece
    end_s: float = 0.0  # answer complete, or given up
    gaps_s: array[float] = field(default_factory=lambda: array("d"))  # between pieces
    tokens: int = 0  # of the answer, as the server counts them, else pieces
    counted: bool = False  # by the server
    failure: Failure | None = None

    @property
    def late_s(self) -> float:
        return max(0.0, self.sent_s - self.job.at_s)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for an answer of one token."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    def piece(self, now_s: float) -> None:
        """A piece of the answer came."""
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s


@dataclass(frozen=True, slots=True)
class Slo:
    """What an answer must keep to count as good. Milliseconds."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 100.0

    def met(self, outcome: Outcome) -> bool:
        """An answer of one token has no time per token to miss."""
        if outcome.failure is not None or outcome.ttft_s is None:
            return False
        tpot = outcome.tpot_s or 0.0
        return outcome.ttft_s * 1e3 <= self.ttft_ms and tpot * 1e3 <= self.tpot_ms


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a set of times, milliseconds; all None where the set is empty."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class ErrorCount:
    kind: str
    count: int
    example: str  # the first message of that kind


@dataclass(frozen=True, slots=True)
class Summary:
    """A replay in figures. Latencies are those of answers that came whole."""

    requests: int
    ok: int
    failed: int
    duration_s: float  # from the first arrival to the last end
    prompt_tokens: int  # of answered requests
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    peak_running: int
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    slo: Slo
    good: int  # requests that kept the SLO
    goodput_per_s: float
    errors: tuple[ErrorCount, ...]
    late_ms: Spread  # how much later than planned this client sent requests
    late_starts: int  # those later than LATE_S
    uncounted: int = 0  # answers whose tokens the server did not count; a piece stood for a token
    left_out: int = 0  # requests of the trace that had not ended when the replay was interrupted
