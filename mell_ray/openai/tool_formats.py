"""How models write tool calls, and the grammars that make them do so.

Three forms cover the models that are served most; which one a model was trained on shows in its
chat template:

- ``hermes`` (Hermes, Qwen): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, repeated
- ``llama3_json`` (Llama 3.x): the whole answer is ``{"name": ..., "parameters": {...}}``
- ``mistral``: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from llguidance import LLMatcher

from mell_ray.openai.limits import MAX_TOOL_CALLS
from mell_ray.openai.options import FunctionDefinition
from mell_ray.openai.structured import ANY_OBJECT, JSON_OPTIONS
from mell_ray.openai.tokenizer import Tokenizer

ToolFormatName = Literal["hermes", "llama3_json", "mistral"]

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of tool calls."""

    name: ToolFormatName
    opening: str  # text or token before a call or a list of calls; empty: the answer begins with it
    closing: str  # text after a call, where there is one
    separator: str  # what stands between calls; empty: one call at most
    head: str  # of a list of calls, after ``opening``
    tail: str
    arguments: str  # key of the arguments

    def marker_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the markers that are tokens of their own, which must not be left out as special
        tokens usually are."""
        ids = (_token_id(tokenizer, marker) for marker in (self.opening, self.closing))
        return frozenset(token_id for token_id in ids if token_id is not None)

    def grammar(
        self,
        functions: Sequence[FunctionDefinition],
        tokenizer: Tokenizer,
        *,
        parallel: bool,
        answer: dict[str, Any] | None = None,
    ) -> str:
        """The grammar of one call (of several, with ``parallel``) to these functions.

        :param answer: a schema that the answer may follow instead of calling anything.
        """
        more = MAX_TOOL_CALLS - 1 if parallel and self.separator else 0
        rules = [
            "%llguidance {}",
            "start: calls" + (" | answer" if answer is not None else ""),
            f"calls: {self._list(tokenizer, more)}",
            f"call: {self._call(tokenizer)}",
            *_functions(functions, self.arguments),
        ]
        if answer is not None:
            rules.append(f"answer: {_json_rule(answer)}")
        return LLMatcher.grammar_from_lark("\n".join(rules))

    def free_grammar(
        self, functions: Sequence[FunctionDefinition], tokenizer: Tokenizer, *, parallel: bool
    ) -> str:
        """The grammar of any text that may hold calls: where one begins, it is a call to one of
        these functions. A function that is not ``strict`` takes any object."""
        loose = [
            function if function.strict else function.model_copy(update={"parameters": ANY_OBJECT})
            for function in functions
        ]
        rules = ["%llguidance {}", *_functions(loose, self.arguments)]
        if not self.opening:
            # The whole answer is a call or is none, which shows with its first character.
            rules += ["start: object | TEXT?", r"TEXT: /\s*[^\s{](?s:.*)|\s+/"]
            return LLMatcher.grammar_from_lark("\n".join(rules))
        more = MAX_TOOL_CALLS - 1 if parallel else 0
        opening = _terminal(self.opening, tokenizer)
        if opening == json.dumps(self.opening):
            any_text = "/(?s:.*)/"
            marked = f"/(?s:.*){re.escape(self.opening)}(?s:.*)/"
            rules += [f"before[suffix={opening}]: {any_text}", f"TEXT: /(?s:.+)/ & ~{marked}"]
        else:
            rules += [f"before: TEXT? {opening}", "TEXT: /(?s:.+)/"]
        if self.head:
            head, tail = json.dumps(self.head), json.dumps(self.tail)
            rules.append(f"called: {head} object{self._repeated('object', more)} {tail}")
            most = 1
        else:
            rules.append(f"called: {self._inside(tokenizer)}")
            most = 1 + more
        rules.append(f"start: (before called){{0,{most}}} TEXT?")
        return LLMatcher.grammar_from_lark("\n".join(rules))

    def _repeated(self, rule: str, more: int) -> str:
        return f" ({json.dumps(self.separator)} {rule}){{0,{more}}}" if more else ""

    def _list(self, tokenizer: Tokenizer, more: int) -> str:
        repeated = self._repeated("call", more)
        if not self.head:
            return f"call{repeated}"
        opening = _terminal(self.opening, tokenizer)
        return f"{opening} {json.dumps(self.head)} call{repeated} {json.dumps(self.tail)}"

    def _call(self, tokenizer: Tokenizer) -> str:
        if not self.closing:
            return "object"
        return f"{_terminal(self.opening, tokenizer)} {self._inside(tokenizer)}"

    def _inside(self, tokenizer: Tokenizer) -> str:
        """What follows the opening of a call that has a closing."""
        line = json.dumps("\n")
        return f"{line} object {line} {_terminal(self.closing, tokenizer)}"


def _functions(functions: Sequence[FunctionDefinition], key: str) -> list[str]:
    """The rules of ``object``, which names one of these and gives its arguments under ``key``."""
    rules = ["object: " + " | ".join(f"object_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        begin = f'{{"name": {json.dumps(function.name)}, "{key}": '
        parameters = NO_PARAMETERS if function.parameters is None else function.parameters
        schema = parameters if "type" in parameters else {"type": "object", **parameters}
        rules += [
            f"object_{i}: {json.dumps(begin)} arguments_{i} {json.dumps('}')}",
            f"arguments_{i}: {_json_rule(schema)}",
        ]
    return rules


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "\n", "", "", "arguments")
LLAMA3_JSON = ToolFormat("llama3_json", "", "", "", "", "", "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", ", ", " [", "]", "arguments")
TOOL_FORMATS = {form.name: form for form in (HERMES, LLAMA3_JSON, MISTRAL)}


def find_format(setting: str, tokenizer: Tokenizer) -> ToolFormat | None:
    """The form that ``tool_call_format`` names; with 'auto' the one that the model's chat template
    speaks, or None if it knows no tools or no form of ours."""
    if setting != "auto":
        return TOOL_FORMATS[cast(ToolFormatName, setting)]
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template)
    if "tools" not in text or "<function=" in text or "[ARGS]" in text:
        return None
    if HERMES.opening in text:
        return HERMES
    if MISTRAL.opening in text:
        return MISTRAL
    if '"parameters"' in text and ("<|python_tag|>" in text or "ipython" in text):
        return LLAMA3_JSON
    return None


def _token_id(tokenizer: Tokenizer, marker: str) -> int | None:
    ids = tokenizer.encode(marker, add_special_tokens=False) if marker else []
    return ids[0] if len(ids) == 1 else None


def _terminal(marker: str, tokenizer: Tokenizer) -> str:
    """A marker in a grammar: special tokens are no text there."""
    token_id = _token_id(tokenizer, marker)
    if token_id is not None and token_id in tokenizer.all_special_ids:
        return f"<[{token_id}]>"
    return json.dumps(marker)


def _json_rule(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})
