"""Stop strings over a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is complete first, reading character by character.

    So the result does not depend on how the text was cut into tokens. One Knuth-Morris-Pratt
    automaton per stop string; ``pending`` is how many of the characters read last may belong to a
    stop string that is not complete yet.
    """

    __slots__ = ("_fails", "_first", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._fails = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)

    @property
    def pending(self) -> int:
        return max(self._states, default=0)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Read on. ``(read, length)`` once a stop string is complete: the first ``read``
        characters of ``text`` end with it and it has ``length`` characters (the longest, if
        several end there); ``None`` as long as there is none. Nothing is fed after a find."""
        if not any(self._states) and self._first.isdisjoint(text):
            return None
        for position, char in enumerate(text):
            length = self._step(char)
            if length:
                return position + 1, length
        return None

    def _step(self, char: str) -> int:
        complete = 0
        for i, stop in enumerate(self._stops):
            state, fail = self._states[i], self._fails[i]
            while state and stop[state] != char:
                state = fail[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                complete = max(complete, state)
            self._states[i] = state
        return complete


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
