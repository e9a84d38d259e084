"""Reads ``{"name": "...", "arguments": {...}}`` while it is being written."""

from __future__ import annotations

import json
from typing import Literal

_ARGUMENTS = ("arguments", "parameters")

_State = Literal["start", "key", "in key", "colon", "value", "in value", "comma", "done"]


class CallScanner:
    """A JSON object, character by character, of which two members matter.

    ``take`` gives the arguments' text as far as it is known. Arguments that a model wrote as a
    string of JSON are given without their quotes once they are complete. What stands inside a
    member's value is not checked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._state: _State = "start"
        self._key = ""
        self._raw = ""  # of the key or value being read
        self._depth = 0
        self._in_string = self._escaped = False
        self._arguments = ""  # not taken yet
        self._seen_arguments = False

    @property
    def done(self) -> bool:
        return self._state == "done"

    @property
    def has_arguments(self) -> bool:
        """Whether the arguments have begun, or will never come."""
        return self._seen_arguments or self.done

    def take(self) -> str:
        if self.done and not self._seen_arguments:
            self._seen_arguments, self._arguments = True, "{}"
        fresh, self._arguments = self._arguments, ""
        return fresh

    def feed(self, char: str) -> bool:
        """Read on. False: this is no such object."""
        if self._state == "in key":
            return self._read_key(char)
        if self._state == "in value":
            return self._read_value(char)
        if self._state == "value":
            return char.isspace() or self._begin_value(char)
        return char.isspace() or self._read_mark(char)

    def _read_mark(self, char: str) -> bool:
        match self._state, char:
            case "start", "{":
                self._state = "key"
            case "key", '"':
                self._state, self._raw = "in key", char
            case "colon", ":":
                self._state = "value"
            case "comma", ",":
                self._state = "key"
            case (("comma" | "key"), "}"):
                self._state = "done"
            case _:
                return False
        return True

    def _read_key(self, char: str) -> bool:
        self._raw += char
        if self._ends_string(char):
            self._state = "colon"
            return self._decode_key()
        return True

    def _decode_key(self) -> bool:
        try:
            self._key = json.loads(self._raw, strict=False)
        except ValueError:
            return False
        return True

    def _begin_value(self, char: str) -> bool:
        if char in ",}]:":
            return False
        self._state, self._raw, self._depth = "in value", "", 0
        self._in_string = self._escaped = False
        return self._read_value(char)

    def _read_value(self, char: str) -> bool:
        scalar = not self._in_string and self._depth == 0 and self._raw != ""
        if scalar and (char in ",}" or char.isspace()):  # the end of a number or a word
            return self._end_value() and (char.isspace() or self._read_mark(char))
        self._raw += char
        if self._in_string:
            self._in_string = not self._ends_string(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        self._told(char)
        complete = self._depth == 0 and not self._in_string and char in '"}]'
        return self._end_value() if complete else True

    def _told(self, char: str) -> None:
        if self._key in _ARGUMENTS and not self._raw.startswith('"'):
            self._seen_arguments = True
            self._arguments += char

    def _ends_string(self, char: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _end_value(self) -> bool:
        self._state = "comma"
        if self._key == "name" or (self._key in _ARGUMENTS and self._raw.startswith('"')):
            try:
                value = json.loads(self._raw, strict=False)
            except ValueError:
                return False
            if not isinstance(value, str):
                return False
            if self._key == "name":
                self.name = value
            else:
                self._seen_arguments = True
                self._arguments += value
        return True
