"""Every setting of mell-ray, one pydantic tree.

The upper part has the shape of ``ray.serve.llm`` (``llm_configs[].model_loading_config``,
``deployment_config.autoscaling_config``, ``engine_kwargs`` with vLLM's names), so that a user of
Ray Serve LLM changes one line. What is ours alone lies under ``mell``. Unknown keys are errors
that name the key.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mell_ray.config_errors import describe
from mell_ray.errors import ConfigError
from mell_ray.origins import check_origins

BUILTIN_SOURCE = "builtin"

Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelLoadingConfig(_Strict):
    model_id: str = Field(min_length=1, description="Name that clients use.")
    model_source: str | None = Field(
        default=None,
        description="Hugging Face id, a local directory, or 'builtin' for the model in the box. "
        "Defaults to model_id.",
    )

    @property
    def source(self) -> str:
        return self.model_source or self.model_id


class EngineConfig(_Strict):
    """One replica's engine. Names and meanings are vLLM's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="'auto': the checkpoint's on a GPU, float32 on a CPU."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Prompt + output limit in tokens; default: the model's."
    )
    max_num_seqs: int = Field(default=64, ge=1, description="Running sequences per replica.")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="Token budget of one step: decodes first, then prefill."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens per KV block.")
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="'auto': the model's dtype. 'int8': about half the bytes of 16 bits, so that "
        "the same memory holds twice the blocks and a migration sends half; costs accuracy and "
        "time (measured in kernels/benchmarks).",
    )
    enable_prefix_caching: bool = Field(
        default=True,
        description="Keep the KV of past prompts and use it where a new one begins alike.",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for all that a replica holds there: weights, what a "
        "step needs, CUDA graphs, and the KV pool, which gets the rest.",
    )
    enforce_eager: bool = Field(
        default=False, description="Decode on a GPU without CUDA graphs: slower, less memory."
    )
    kv_cache_memory_bytes: int = Field(
        default=64 << 20, ge=1, description="Size of the KV pool on a CPU replica."
    )
    num_gpu_blocks_override: int | None = Field(
        default=None, ge=1, description="Exact number of KV blocks, whatever the memory."
    )
    num_threads: int = Field(default=1, ge=1, description="Compute threads of a CPU replica.")
    weight_copies_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the host's free memory that a CPU replica may take for faster "
        "layouts of its weights: up to two of bfloat16 ones, each as large as they are, and an "
        "int8 one of the matrix that gives the logits, beside which it is kept plain. 0: none.",
    )
    dense_kv_share: float = Field(
        default=1.0,
        ge=0,
        le=4,
        description="Memory that a CPU replica may take for dense copies of the KV of running "
        "decodes of up to 512 tokens, which attention reads faster than blocks, as a share of its "
        "KV pool; at most a quarter of the host's free memory. 0: none.",
    )
    revision: str | None = Field(default=None, description="Hub revision of the model.")
    generation_config: Literal["auto", "vllm"] = Field(
        default="auto",
        description="Where a request leaves out temperature, top_p, top_k, min_p, "
        "repetition_penalty or max_tokens: 'auto': what the model's generation_config.json says "
        "counts (for max_tokens its max_new_tokens), as with vLLM and transformers; 'vllm': "
        "OpenAI's defaults count.",
    )

    @model_validator(mode="after")
    def _budget_fits_decodes(self) -> EngineConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or a full batch cannot decode"
            )
        return self


class AutoscalingConfig(_Strict):
    min_replicas: int = Field(default=1, ge=0, description="Replicas kept, busy or not.")
    max_replicas: int = Field(default=1, ge=1, description="Replicas at most.")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) exceeds max_replicas ({self.max_replicas})"
            )
        return self


class DeploymentConfig(_Strict):
    autoscaling_config: AutoscalingConfig = AutoscalingConfig()
    max_ongoing_requests: int | None = Field(
        default=None, ge=1, description="Requests placed on one replica; default: no limit but KV."
    )
    tpot_target_ms: float | None = Field(
        default=None,
        gt=0,
        description="Time per output token beyond which a replica is full: nothing more is packed "
        "onto one whose predicted step takes longer.",
    )


class LLMConfig(_Strict):
    model_loading_config: ModelLoadingConfig
    accelerator_type: str | None = Field(
        default=None,
        description="Ray accelerator type (e.g. 'H100'). 'GPU': any GPU, awaited where the cluster "
        "has none yet. 'CPU': never a GPU. Unset: a GPU where the cluster has one, else CPU.",
    )
    tool_call_format: Literal["auto", "hermes", "llama3_json", "mistral"] = Field(
        default="auto",
        description="How the model writes tool calls; 'auto': as its chat template shows.",
    )
    deployment_config: DeploymentConfig = DeploymentConfig()
    engine_kwargs: EngineConfig = EngineConfig()

    @field_validator("accelerator_type")
    @classmethod
    def _spelled_as_ray_does(cls, name: str | None) -> str | None:
        """Ray waits for ever for a type that no node has, so the usual slips are refused."""
        if name is None:
            return None
        bare = re.sub(r"^nvidia[\s_-]+", "", name.strip(), flags=re.IGNORECASE)
        if bare.upper() in ("CPU", "GPU") or re.fullmatch(r"[a-zA-Z]{1,3}\d+[a-zA-Z]?", bare):
            bare = bare.upper()
        if not bare:
            raise ValueError("is empty; leave it out, or write 'GPU', 'CPU' or a type of Ray's")
        if bare != name:
            raise ValueError(f"Ray's name is {bare!r}, not {name!r}")
        return name

    @property
    def model_id(self) -> str:
        return self.model_loading_config.model_id


class PolicyConfig(_Strict):
    name: str = Field(default="tide", description="Scheduling policy.")
    params: dict[str, Any] = Field(default_factory=dict, description="The policy's own settings.")


class MigrationConfig(_Strict):
    enabled: bool = Field(default=True, description="Let the policy move running requests.")
    mode: Literal["auto", "kv", "token", "hybrid"] = Field(
        default="auto",
        description="How KV gets to the target: sent, computed there again, or both at once from "
        "the two ends; 'auto' takes the cheapest each time.",
    )
    max_concurrent: int = Field(default=4, ge=1, description="Migrations in flight at once.")
    max_stages: int = Field(default=8, ge=1, description="Live copy rounds before the freeze.")
    timeout_s: float = Field(
        default=30.0, gt=0, description="A migration not committed by then is aborted."
    )
    link_gb_per_s: float = Field(
        default=5.0,
        gt=0,
        description="First guess of the bandwidth between replicas; corrected by what is measured.",
    )
    prefill_tokens_per_s: float = Field(
        default=8000.0,
        gt=0,
        description="First guess of a replica's prefill speed; corrected by what is measured.",
    )
    price_s: float | None = Field(
        default=None,
        ge=0,
        description="GPU-seconds that moving one token costs; default: the time it takes, as "
        "learnt. 0: pack as tightly as possible, whatever moves that takes.",
    )
    freeze_limit_s: float = Field(
        default=3.0,
        gt=0,
        description="A source settles a frozen request by itself after it, should the Migrator "
        "have died between freeze and commit.",
    )
    transports: tuple[Literal["objects", "cuda_ipc", "nccl"], ...] = Field(
        default=("cuda_ipc", "nccl", "objects"),
        description="Ways by which blocks may travel. The fastest that reaches is taken; Ray "
        "objects are always allowed, as the one that never fails alone.",
    )
    chunk_bytes: int = Field(
        default=32 << 20, ge=1, description="Blocks travel in chunks of at most that many bytes."
    )
    tail_bytes: int = Field(
        default=1 << 20,
        ge=0,
        description="Blocks of at most that many bytes are not copied while their request decodes "
        "on, but sent when it is handed over: fewer messages, and no longer a pause to speak of.",
    )
    max_concurrent_per_replica: int = Field(
        default=2, ge=1, description="Migrations in flight at once from or to one replica."
    )
    buffer_bytes: int = Field(
        default=128 << 20, ge=1, description="Chunks on their way at once from or to one replica."
    )
    max_bytes_per_s: float | None = Field(
        default=None, gt=0, description="What migrations may send or receive per replica."
    )
    step_share: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Share of step time that copying blocks may take while others decode.",
    )
    slowdown: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="By how much moves that can wait may slow the other requests of a replica "
        "down, in the long run; 1: without limit. What their copies and messages take is measured, "
        "and the replica is then left alone until this share is kept. Moves for want of room, of "
        "an operator, or from a node that must go do not wait.",
    )


class FleetConfig(_Strict):
    idle_grace_s: float = Field(
        default=10.0, ge=0, description="An empty replica above the minimum is released after it."
    )
    spare_gpus: int = Field(default=0, ge=0, description="Empty replicas kept ready.")
    forecast: bool = Field(
        default=False,
        description="Open replicas ahead of demand, as its course and their start-up time suggest.",
    )
    startup_timeout_s: float = Field(
        default=600.0, gt=0, description="A replica not ready by then is given up and tried again."
    )
    replica_lease_s: float = Field(
        default=30.0,
        gt=1,
        description="A replica that no Router has asked for that long ends itself.",
    )
    sleep: bool = Field(
        default=False,
        description="A superfluous replica sleeps rather than ends: it gives its GPU back to Ray, "
        "keeps its process and its weights in host memory, and wakes within a fraction of a start. "
        "A sleeping replica keeps its node from an autoscaler.",
    )
    max_asleep: int = Field(
        default=2, ge=0, description="Sleeping replicas that a model may have; more end."
    )
    turn_s: float = Field(
        default=5.0,
        gt=0,
        description="Where models whose replicas sleep wait for each other's slots: how long one "
        "that is in use is left alone. Then it takes nothing new, and after as long again what "
        "still runs there waits for its model's next turn.",
    )
    share_weights: bool | None = Field(
        default=None,
        description="Keep one copy of a model's weights in each node's memory: replicas that start "
        "there take them from it, and CPU replicas run from it. Unset: for CPU replicas, and for "
        "replicas that sleep.",
    )
    cpu_resource: str = Field(
        default="mell_cpu",
        description="Custom resource that a CPU replica takes one of. Where no node of the "
        "cluster offers it, CPU replicas take none.",
    )
    require_cpu_resource: bool = Field(
        default=False,
        description="A CPU replica waits for a node that offers cpu_resource, such as one that an "
        "autoscaler brings.",
    )


class IngressConfig(_Strict):
    num_replicas: int = Field(default=1, ge=1, description="Ingress processes.")
    max_ongoing_requests: int = Field(default=1024, ge=1, description="Per ingress replica.")
    drain_s: float = Field(
        default=20.0, ge=0, description="How long a stopping ingress lets its streams go on."
    )
    default_max_tokens: int = Field(
        default=256,
        ge=1,
        description="Output limit of a request that names none, where its model's "
        "generation_config.json names none either.",
    )
    max_body_bytes: int = Field(
        default=16 << 20, ge=1, description="A longer request body is answered 413."
    )
    max_concurrent_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Requests of one API key that an ingress replica runs at once; more are "
        "answered 429. Default: no limit.",
    )
    allowed_origins: Annotated[list[str], AfterValidator(check_origins)] = Field(
        default_factory=list,
        description="Origins whose web pages may call and read the answers, as browsers write them "
        "('https://chat.example.com'), or '*' for all. Default: none, as any page that somebody "
        "opens could else use a server in their reach that asks for no key, and operate it. "
        "Cookies are never allowed; a page sends its key in the Authorization header.",
    )


class KeySource(_Strict):
    """Where a list of API keys is. The keys themselves never stand in a configuration."""

    files: list[str] = Field(
        default_factory=list,
        description="Files that hold one key a line, with ' weight=NUMBER' behind it if it "
        "shares by weight ('#' begins a comment), or directories of "
        "such files, like a mounted secret. Read again when they change.",
    )
    env: list[str] = Field(
        default_factory=list,
        description="Environment variables that hold one key, or several with commas between.",
    )

    @property
    def given(self) -> bool:
        return bool(self.files or self.env)


class AuthConfig(_Strict):
    """API keys, sent as ``Authorization: Bearer KEY``. Without any, everybody may call."""

    clients: KeySource = Field(default=KeySource(), description="Keys for the whole HTTP API.")
    operators: KeySource = Field(
        default=KeySource(),
        description="Keys that open the operator API (/mell/v1) too, which clients' keys then "
        "do not.",
    )
    fair_share: bool = Field(
        default=False,
        description="Waiting requests are placed by fair shares among API keys rather than in "
        "turn; a line 'KEY weight=2' gives a key twice the share of one without.",
    )


class TracingConfig(_Strict):
    exporter: Literal["none", "otlp", "file"] = Field(
        default="none",
        description="Where OpenTelemetry spans go: nowhere, to a collector (OTLP over HTTP, needs "
        "mell-ray[tracing]), or into files of JSON lines.",
    )
    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="The collector's address; default: OTEL_EXPORTER_OTLP_ENDPOINT, else port "
        "4318 of the node.",
    )
    directory: str = Field(
        default="/tmp/mell-traces",
        min_length=1,
        description="Where the exporter 'file' writes, one file per process.",
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the requests that are traced; a client's own traceparent decides "
        "for its request.",
    )


class ObservabilityConfig(_Strict):
    tracing: TracingConfig = TracingConfig()


class MellSettings(_Strict):
    """What Ray Serve LLM does not have."""

    policy: PolicyConfig = PolicyConfig()
    migration: MigrationConfig = MigrationConfig()
    fleet: FleetConfig = FleetConfig()
    ingress: IngressConfig = IngressConfig()
    auth: AuthConfig = AuthConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    epoch_s: float = Field(default=0.25, gt=0, description="Planning tick of the Router.")
    max_queued_requests: int = Field(
        default=256, ge=0, description="Requests waiting for room; more are answered 503."
    )
    namespace: str = Field(default="mell", min_length=1, description="Ray namespace of replicas.")
    control_resource: str | None = Field(
        default=None,
        min_length=1,
        description="Custom resource of the nodes that may hold the Router, the Migrator and the "
        "ingress. On any other node these would keep an autoscaler from taking it back.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="WARNING", description="Of all our processes; logs are one JSON object a line."
    )
    seed: int = Field(default=0, description="Of the scheduler's own choices.")

    @model_validator(mode="after")
    def _need_keys(self) -> MellSettings:
        if self.ingress.max_concurrent_per_key is not None and not self.auth.clients.given:
            raise ValueError("ingress.max_concurrent_per_key needs keys in auth.clients")
        if self.auth.fair_share and not self.auth.clients.given:
            raise ValueError("auth.fair_share needs keys in auth.clients")
        return self


class MellConfig(_Strict):
    """The ``args`` of ``mell_ray.serving:build_openai_app``."""

    llm_configs: list[LLMConfig] = Field(min_length=1)
    mell: MellSettings = MellSettings()

    @model_validator(mode="after")
    def _sleep_needs_weights(self) -> MellConfig:
        if self.mell.fleet.sleep and self.mell.fleet.share_weights is False:
            raise ValueError("mell.fleet.sleep needs mell.fleet.share_weights, which is false")
        return self

    @model_validator(mode="after")
    def _unique_ids(self) -> MellConfig:
        ids = [c.model_id for c in self.llm_configs]
        for model_id in ids:
            if ids.count(model_id) > 1:
                raise ValueError(f"model_id {model_id!r} stands in llm_configs twice")
        return self

    @classmethod
    def parse(cls, args: Any) -> MellConfig:
        """Validate ``args`` (dict or MellConfig).

        Raises:
            ConfigError: with one line per wrong setting, each naming its path.
        """
        return parse_config(cls, args)


def parse_config(model: type[Model], args: Any) -> Model:
    """Validate ``args`` into ``model``; pydantic's error becomes one readable ``ConfigError``."""
    if isinstance(args, model):
        return args
    try:
        return model.model_validate(args)
    except ValidationError as error:
        raise ConfigError(describe(model, error)) from None
