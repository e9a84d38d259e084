"""The request bodies of ``/v1/chat/completions`` and ``/v1/completions``.

A body is accepted, or refused with an error that names the field: nothing that changes the answer
is silently ignored. A field with the value ``null`` counts as not given, as clients send it so.
After validation the values have one shape each, whatever form they came in: ``stop`` a tuple of
strings, ``content`` a string, ``prompt`` a tuple of prompts, ``logit_bias`` a tuple of pairs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mell_ray.openai.limits import (
    MAX_BIAS,
    MAX_CHOICES,
    MAX_INT32,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_N,
    MAX_NAME_CHARS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_SEED,
)

Prompt = str | tuple[int, ...]

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Fields that stock clients send and that cannot change which tokens come back.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
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
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_COMPLETION: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}
UNSUPPORTED_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def check_text(text: str) -> str:
    """Refuse what no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            "the text holds an unpaired surrogate, which is not valid Unicode"
        ) from None
    return text


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


def _content(value: Any) -> str:
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('must be a string or a non-empty list of {"type": "text"} parts')
    return "\n".join(_text_part(part) for part in value)


def _participant(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(check_text(value)) <= MAX_NAME_CHARS:
        raise ValueError(f"must be a string of 1 to {MAX_NAME_CHARS} characters")
    return value


def _identifier(value: Any) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise ValueError("must have 1 to 64 letters, digits, underscores or hyphens")
    return value


def _text_part(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise ValueError('only content parts of {"type": "text"} are supported')
    if not isinstance(part.get("text"), str) or len(part) != 2:
        raise ValueError('a text part must be {"type": "text", "text": "..."}')
    return check_text(part["text"])


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


class _Body(BaseModel):
    """Shared handling of ``null``, harmless, unsupported and unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = {k: v for k, v in data.items() if v is not None and k not in cls.ignored}
        errors = [
            InitErrorDetails(
                type=PydanticCustomError("unsupported_field", "{reason}", {"reason": reason}),
                loc=(str(name),),
                input=given[name],
            )
            for name in given
            if (reason := cls._refusal(name, given[name])) is not None
        ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return {k: v for k, v in given.items() if k in cls.field_names()}

    @classmethod
    def field_names(cls) -> list[str]:
        """The fields as clients write them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _refusal(cls, name: Any, value: Any) -> str | None:
        if name in cls.field_names():
            return None
        allowed = cls.unsupported.get(name)
        if allowed is None:
            near = get_close_matches(str(name), cls.field_names(), n=1)
            return "unknown field" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
        if any(type(value) is type(ok) and value == ok for ok in allowed):
            return None
        return "not supported by this server; remove it"


class Message(_Body):
    """One message of a chat. ``content`` parts of type text are joined by line breaks.

    ``name`` goes to the chat template, which may or may not make use of it.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"annotations"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: Annotated[str, BeforeValidator(_participant)] | None = None


class StreamOptions(_Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: StrictBool = False


class JsonSchema(_Body):
    """``strict`` makes no difference: the answer always follows the schema."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description"})

    name: Annotated[str, BeforeValidator(_identifier)]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool = False


class ResponseFormat(_Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _with_its_type(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        kind = info.data.get("type")
        if kind == "json_schema" and value is None:
            raise ValueError("is required with type 'json_schema'")
        if kind != "json_schema" and kind is not None and value is not None:
            raise ValueError("is only allowed with type 'json_schema'")
        return value


class GenerationRequest(_Body, ABC):
    """What both endpoints share. Fields beyond OpenAI's have vLLM's names and meanings."""

    model: Annotated[str, BeforeValidator(_name)]
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] = 1
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_INT32)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_INT32)] = 0
    temperature: Annotated[StrictFloat, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_INT32)] = 0
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.0
    seed: Annotated[StrictInt, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    frequency_penalty: Annotated[StrictFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    presence_penalty: Annotated[StrictFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=MAX_REPETITION_PENALTY)] = 1.0
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
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_INT32)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] = 0

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
