"""Reusable chunk buffers: the first touch of fresh memory costs several times its copy."""

from __future__ import annotations

import numpy as np

# A migration has at most this many chunks between gather and the moment its answer has left.
BUFFERS_PER_MIGRATION = 2


class Staging:
    """Host buffers of one replica. Each migration takes turns between two of them: the first may
    be written again when the third chunk is asked for, because the driver asks for it only
    after the target has taken the first one in."""

    def __init__(self) -> None:
        self._idle: list[np.ndarray] = []
        self._used: dict[str, list[np.ndarray]] = {}
        self._turn: dict[str, int] = {}

    def take(self, migration_id: str, nbytes: int) -> np.ndarray:
        """1-D uint8 of ``nbytes``; its content is whatever was there."""
        buffers = self._used.setdefault(migration_id, [])
        turn = self._turn.get(migration_id, 0)
        self._turn[migration_id] = (turn + 1) % BUFFERS_PER_MIGRATION
        if turn >= len(buffers):
            buffers.append(self._idle.pop() if self._idle else np.empty(nbytes, np.uint8))
        if buffers[turn].size < nbytes:
            buffers[turn] = np.empty(nbytes, np.uint8)
        return buffers[turn][:nbytes]

    def release(self, migration_id: str) -> None:
        """The migration has ended; unknown ids are fine."""
        self._turn.pop(migration_id, None)
        self._idle += self._used.pop(migration_id, [])

    @property
    def nbytes(self) -> int:
        """Memory held, in use or waiting."""
        held = [*self._idle, *(buffer for used in self._used.values() for buffer in used)]
        return sum(buffer.size for buffer in held)

    def trim(self, nbytes: int) -> None:
        """Give idle buffers back while more than ``nbytes`` are held."""
        while self._idle and self.nbytes > nbytes:
            self._idle.pop()
