"""Memory that the heap has no use for."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest

from mell_ray.serving import heap
from tests.engine.support import wait_for

LIBC = ctypes.CDLL(None)
NUM_BLOCKS, BLOCK_BYTES = 60_000, 1000
KEPT_EVERY = 50  # more apart than pages are large


def _trim() -> None:
    """In a process of its own, whose heap is as no other test has left it."""
    LIBC.malloc.restype = ctypes.c_void_p
    LIBC.free.argtypes = [ctypes.c_void_p]
    blocks = [LIBC.malloc(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    kept, freed = blocks[::KEPT_EVERY], [b for i, b in enumerate(blocks) if i % KEPT_EVERY]
    for block in freed:
        LIBC.free(block)
    process = psutil.Process()
    before = process.memory_info().rss
    heap.EVERY_S = 0.01
    heap.keep_trimmed.__wrapped__()
    wait_for(lambda: process.memory_info().rss < before - NUM_BLOCKS * BLOCK_BYTES // 2)
    for block in kept:
        LIBC.free(block)


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="not glibc")
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_trim).result()
