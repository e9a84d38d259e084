"""Gives memory that the heap has no use for back to the system.

Ray's many threads allocate and free small things in heaps of their own, whose holes glibc keeps:
some MiB an hour in each process, and more after a burst.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache

EVERY_S = 30.0


@cache
def keep_trimmed() -> None:
    """From now on, in this process; nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        threading.Thread(target=_keep, args=[trim], name="mell-heap", daemon=True).start()


def _keep(trim: Callable[[int], int]) -> None:
    while True:
        time.sleep(EVERY_S)
        trim(0)  # other threads run meanwhile
