"""What all parts of a request body share: ``null``, harmless, unsupported and unknown fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

# Marks of where a prompt may be cached, which clients put on parts, messages and tools alike.
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_text(text: str) -> str:
    """Refuse what no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            "the text holds an unpaired surrogate, which is not valid Unicode"
        ) from None
    return text


def identifier(value: Any) -> str:
    """A name as OpenAI allows it; for pydantic."""
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise ValueError("must have 1 to 64 letters, digits, underscores or hyphens")
    return value


class Body(BaseModel):
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
