"""The request bodies of ``/v1/chat/completions`` and ``/v1/completions``.

A body is accepted, or refused with an error that names the field: nothing that changes the answer
is silently ignored. A field with the value ``null`` counts as not given, as clients send it so.
After validation the values have one shape each, whatever form they came in: ``stop`` a tuple of
strings, ``content`` a string, ``prompt`` a tuple of prompts, ``logit_bias`` a tuple of pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
)

from mell_ray.openai.body import Body, check_text
from mell_ray.openai.limits import (
    MAX_BIAS,
    MAX_CHOICES,
    MAX_INT32,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_SEED,
)
from mell_ray.openai.messages import Message
from mell_ray.openai.options import (
    FunctionDefinition,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolChoice,
    check_distinct,
    check_tool_choice,
    check_tools,
)
from mell_ray.openai.sampling import (
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)

Prompt = str | tuple[int, ...]

# Fields that stock clients send and that cannot change which tokens come back.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Fields that would change the answer and that are not supported, with the values that ask for
# what happens anyway. Any other value is refused.
UNSUPPORTED_CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"], []),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_COMPLETION: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
    for string in strings:
        if not 1 <= len(check_text(string)) <= MAX_STOP_CHARS:
            raise ValueError(f"a stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(strings)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError("must be an object that maps token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} entries are allowed")
    return {_token_key(key): _bias(bias) for key, bias in value.items()}


def _token_key(key: Any) -> int:
    is_number = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
    token = int(key) if is_number else key
    if type(token) is not int or not 0 <= token <= MAX_INT32:
        raise ValueError('keys must be token ids, such as "50256"')
    return token


def _bias(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and -MAX_BIAS <= value <= MAX_BIAS):
        raise ValueError(f"values must be numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return float(value)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(token) is int for token in value)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if not _is_token_ids(value) or len(value) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"must be a list of at most {MAX_STOP_TOKEN_IDS} integer token ids")
    if value and (min(value) < 0 or max(value) > MAX_INT32):
        raise ValueError("token ids must be in the model's vocabulary")
    return tuple(sorted(set(value)))


def _prompt(value: Any) -> tuple[Prompt, ...]:
    prompts: Any = value
    if isinstance(value, str) or (_is_token_ids(value) and value):
        prompts = [value]
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError("must be a string, a list of token ids, or a non-empty list of those")
    if len(prompts) > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES} prompts are allowed in one request")
    return tuple(_one_prompt(prompt) for prompt in prompts)


def _one_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return check_text(prompt)
    if not _is_token_ids(prompt):
        raise ValueError("each prompt must be a string or a list of integer token ids")
    if not prompt:
        raise ValueError("a list of token ids must not be empty")
    if min(prompt) < 0 or max(prompt) > MAX_INT32:
        raise ValueError("token ids must be in the model's vocabulary")
    return tuple(prompt)


def _messages(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a non-empty list of messages")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} messages are allowed")
    return list(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("must be the name of a model, as GET /v1/models lists it")
    return value


class StreamOptions(Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: StrictBool = False


class GenerationRequest(Body, ABC):
    """What both endpoints share. Fields beyond OpenAI's have vLLM's names and meanings. How tokens
    are drawn is None where the client leaves it to the model's ``SamplingDefaults``."""

    model: Annotated[str, BeforeValidator(_name)]
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] = 1
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_INT32)] = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Annotated[StrictInt, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    frequency_penalty: Annotated[StrictFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    presence_penalty: Annotated[StrictFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(
        default_factory=dict
    )
    ignore_eos: StrictBool = False
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_stop_token_ids)] = ()
    response_format: ResponseFormat | None = None  # None: any text
    priority: Annotated[StrictInt, Field(ge=-MAX_INT32, le=MAX_INT32)] = 0
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @field_validator("response_format")
    @classmethod
    def _can_end(cls, value: ResponseFormat, info: ValidationInfo) -> ResponseFormat | None:
        if value.type == "text":
            return None
        if info.data.get("ignore_eos"):
            raise ValueError("cannot be combined with 'ignore_eos', as JSON comes to an end")
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("is only allowed with 'stream': true")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output and its value, ``None`` if the client named none."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives wanted per position; ``None``: no log-probabilities at all."""


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    ignored: ClassVar[frozenset[str]] = IGNORED_FIELDS
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_CHAT

    messages: Annotated[list[Message], BeforeValidator(_messages)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: Annotated[list[Tool], BeforeValidator(check_tools), AfterValidator(check_distinct)] = (
        Field(default_factory=list)
    )
    tool_choice: Annotated[ToolChoice, PlainValidator(check_tool_choice)] = "auto"
    parallel_tool_calls: StrictBool = True

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") not in (None, value):
            raise ValueError("conflicts with 'max_tokens', its older name; give only one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("is only allowed with 'logprobs': true")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _of_these_tools(cls, value: ToolChoice, info: ValidationInfo) -> ToolChoice:
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if value == "required" and not names:
            raise ValueError("is only allowed with 'tools'")
        if isinstance(value, NamedTool) and value.name not in names:
            raise ValueError("must name one of the functions in 'tools'")
        if value not in ("none", "auto") and info.data.get("ignore_eos"):
            raise ValueError("cannot be combined with 'ignore_eos', as a call comes to an end")
        return value if names else "auto"

    @property
    def functions(self) -> list[FunctionDefinition]:
        """What may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.function for tool in self.tools]

    @property
    def demanded(self) -> list[FunctionDefinition]:
        """One of these must be called; empty: nothing has to be."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return [function for function in self.functions if function.name == choice.name]
        return self.functions if choice == "required" else []

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().output_limit

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    ignored: ClassVar[frozenset[str]] = IGNORED_FIELDS
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_COMPLETION

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompt)]
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: StrictBool = False

    @field_validator("prompt")
    @classmethod
    def _bounded_choices(
        cls, value: tuple[Prompt, ...], info: ValidationInfo
    ) -> tuple[Prompt, ...]:
        if len(value) * info.data.get("n", 1) > MAX_CHOICES:
            raise ValueError(f"prompts times n must be at most {MAX_CHOICES}")
        return value

    @field_validator("echo")
    @classmethod
    def _no_prompt_logprobs(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("logprobs") is not None:
            raise ValueError("is not supported together with 'logprobs'; remove one of them")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
