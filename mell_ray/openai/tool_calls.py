"""From a model's text to the tool calls in it, as it comes.

Text is read character by character, so what comes out does not depend on how it was cut. A call is
told as soon as its name is known and its arguments begin; until then its text is held back, and
becomes ordinary text again if it turns out not to be a call to one of the request's tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal

from mell_ray.openai.call_scanner import CallScanner
from mell_ray.openai.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of one tool call: ``id`` and ``name`` with its first, ``arguments`` as JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Parsed:
    """What some text turned out to be."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


_State = Literal["text", "gap", "call", "after", "rest"]


class ToolCallParser:
    """Reads one choice's text.

    :param names: the request's tools; a call to anything else is text.
    :param new_id: the id of the call with that index.
    :param most: calls after which the answer is complete; 0: no bound.
    """

    def __init__(
        self,
        form: ToolFormat,
        names: Collection[str],
        new_id: Callable[[int], str],
        most: int = 0,
    ) -> None:
        self._form = form
        self._names = names
        self._new_id = new_id
        self._state: _State = "text" if form.opening else "gap"
        self._held = ""  # text that may be part of a call, or blanks that may stand before one
        self._scanner = CallScanner()
        self._told = False  # whether the call being read has been told
        self._parsed = Parsed()
        self._most = most
        self.num_calls = 0
        self._num_complete = 0

    @property
    def complete(self) -> bool:
        """Whether nothing that follows matters."""
        return self._num_complete == self._most > 0

    def push(self, text: str) -> Parsed:
        for char in text:
            if self.complete:
                break
            self._step(char)
        return self._take()

    def finish(self) -> Parsed:
        """There is no more text: what is held back is no call."""
        if self._state == "call" and self._told:
            self._tell()
        elif self._state != "after" and not (self.num_calls and self._held.isspace()):
            self._parsed.content += self._held
        self._held = ""
        return self._take()

    def _take(self) -> Parsed:
        parsed, self._parsed = self._parsed, Parsed()
        return parsed

    def _step(self, char: str) -> None:
        match self._state:
            case "text":
                self._read_text(char)
            case "gap":
                self._read_gap(char)
            case "call":
                self._read_call(char)
            case "after":
                self._read_after(char)
            case "rest":
                self._parsed.content += char

    def _read_text(self, char: str) -> None:
        """Hold back blanks and what may be the beginning of the opening marker."""
        opening = self._form.opening
        self._held += char
        mark = self._held.lstrip()
        while not opening.startswith(mark):
            release = self._held.find(opening[0], len(self._held) - len(mark) + 1)
            cut = release if release >= 0 else len(self._held.rstrip())
            self._parsed.content += self._held[:cut]
            self._held = self._held[cut:]
            mark = self._held.lstrip()
        if mark == opening:
            self._state = "gap"

    def _read_gap(self, char: str) -> None:
        """Between a marker or separator and the object of a call."""
        self._held += char
        if char == "{":
            self._state, self._scanner, self._told = "call", CallScanner(), False
            self._scanner.feed(char)
        elif not (char.isspace() or (char == "[" and self._form.head)):
            self._release()

    def _read_call(self, char: str) -> None:
        scanner = self._scanner
        if not self._told:
            self._held += char
        if not scanner.feed(char):
            if self._told:
                self._tell()
                self._state = "after"
            else:
                self._release()
            return
        if scanner.name is not None and scanner.name not in self._names:
            self._release()
        elif scanner.has_arguments and scanner.name is not None:
            self._tell()
        elif scanner.done:
            self._release()
        if scanner.done and self._state == "call":
            self._state = "after"
            self._num_complete += 1

    def _tell(self) -> None:
        fresh, calls = self._scanner.take(), self._parsed.calls
        if not self._told:
            self._told, self._held = True, ""
            index, self.num_calls = self.num_calls, self.num_calls + 1
            calls.append(CallDelta(index, fresh, self._new_id(index), self._scanner.name))
        elif calls and calls[-1].index == self.num_calls - 1:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + fresh)
        elif fresh:
            calls.append(CallDelta(self.num_calls - 1, fresh))

    def _read_after(self, char: str) -> None:
        """After the object: the closing marker, a separator, or text again."""
        self._held += char
        form, mark = self._form, self._held.strip()
        if form.closing:
            if mark == form.closing:
                self._held, self._state = "", "text"
            elif not form.closing.startswith(mark):
                self._resume()
        elif mark in (",", ";"):
            self._held, self._state = "", "gap"
        elif mark == "]" and form.head:
            self._held, self._state = "", "text"
        elif mark:
            self._resume()

    def _release(self) -> None:
        """What was held back is no call."""
        self._state = "rest" if not self._form.opening else "text"
        self._parsed.content += self._held
        self._held = ""

    def _resume(self) -> None:
        """Read what follows a call as text, which may hold the next opening."""
        held, self._held = self._held, ""
        self._state = "rest" if not self._form.opening else "text"
        for char in held:
            self._step(char)


def call_id(form: ToolFormat, request: str, index: int) -> str:
    """The same for the same request, choice and call. Mistral's templates want nine letters or
    digits."""
    digest = blake2b(json.dumps([request, index]).encode(), digest_size=12).hexdigest()
    return digest[:9] if form.name == "mistral" else f"call_{digest}"
