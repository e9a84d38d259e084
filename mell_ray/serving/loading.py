"""Engines of one machine load one after the other, where it has too few cores for several at once.

Loading is work of one core (imports, weights, the self-check). Where there are no cores to spare,
replicas that load at the same time all come late, and those that serve slow down; in turn, the
first is there as soon as if it were alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

CORES_PER_LOAD = 4
PATIENCE_S = 60.0  # one that loads for longer waits for something else than cores: a download
POLL_S = 0.02


def lanes() -> int:
    """How many engines may load at once on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // CORES_PER_LOAD)


@contextmanager
def loading_turn(patience_s: float = PATIENCE_S) -> Iterator[bool]:
    """Wait for one's turn to load; the system ends the turn of a process that dies.

    Yields whether it is one's turn: after ``patience_s``, or where no lock can be had, it goes on
    without one.
    """
    folder = Path(tempfile.gettempdir()) / f"mell-ray-loading-{os.getuid()}"
    give_up = time.monotonic() + patience_s
    with ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            files = [stack.enter_context((folder / str(i)).open("w")) for i in range(lanes())]
        except OSError as error:
            logger.warning("engines cannot take turns to load: %s", error)
            files = []
        mine = False
        while files and not mine and time.monotonic() < give_up:
            mine = any(_lock(file.fileno()) for file in files)
            if not mine:
                time.sleep(POLL_S)
        yield mine


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
