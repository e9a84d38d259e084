"""``response_format``: from what a client asks for to the grammar that the engine follows.

The schema goes to llguidance, which supports most of JSON Schema and refuses the rest by name: an
answer that ends by itself is valid under the whole schema, or the request is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher

from mell_ray.engine.grammar import GrammarCompiler
from mell_ray.errors import InvalidRequestError, OverloadedError
from mell_ray.openai.limits import MAX_SCHEMA_CHARS
from mell_ray.openai.options import ResponseFormat
from mell_ray.openai.tokenizer import Tokenizer

SCHEMA_PARAM = "response_format.json_schema.schema"

COMPILE_TIMEOUT_S = 10.0
_COMPILE_THREADS = 2

# All options are named, so that an "x-guidance" key inside a schema changes none of them. Between
# two parts of the JSON there may be a blank, or a line break and an indentation: without a bound, a
# model that has nothing to say writes blanks for ever.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,32})",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def response_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of a whole answer; None: any text."""
    if wanted is None:
        return None
    return ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.json_schema


def response_grammar(wanted: ResponseFormat | None) -> str | None:
    """The grammar of a whole answer; None: any text."""
    schema = response_schema(wanted)
    return None if schema is None else json_grammar(schema)


def json_grammar(schema: dict[str, Any], param: str = SCHEMA_PARAM) -> str:
    """The grammar of all JSON values that are valid under ``schema``.

    :raises InvalidRequestError: it is too long; whether it is a valid schema shows when the
        grammar is compiled.
    """
    check_schema_size(schema, param)
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"'{param}': {error}", param=param) from None


def check_schema_size(schema: Any, param: str) -> None:
    try:
        length = len(json.dumps(schema, ensure_ascii=False))
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"'{param}': is nested too deep", param=param) from None
    if length > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"'{param}': has {length} characters as JSON; at most {MAX_SCHEMA_CHARS} are allowed",
            param=param,
        )


class GrammarCheck:
    """Compiles a request's grammar before the request is placed, so that a wrong one costs nobody
    else anything. Those that passed are remembered."""

    def __init__(self, tokenizer: Tokenizer, end_token_ids: Iterable[int]) -> None:
        self._compiler = GrammarCompiler(lambda: tokenizer, eos_token_ids=end_token_ids)
        self._pool = ThreadPoolExecutor(_COMPILE_THREADS, "mell-grammar-check")

    async def check(self, grammar: str, param: str) -> None:
        """
        :param param: the field to name if the grammar is at fault.
        :raises InvalidRequestError: it is no schema, uses what is not supported, or is too much.
        :raises OverloadedError: too many others are being compiled.
        """
        if self._compiler.knows(grammar):
            return
        work = self._pool.submit(self._compiler.matcher, grammar)
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                await asyncio.wrap_future(work)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"'{param}': {error.message}", param=param) from None
        except TimeoutError:
            if work.cancelled():
                message = "too many schemas wait to be compiled; try again later"
                raise OverloadedError(message, retry_after_s=1) from None
            raise InvalidRequestError(
                f"'{param}': takes more than {COMPILE_TIMEOUT_S:g} s to compile; simplify it",
                param=param,
            ) from None
