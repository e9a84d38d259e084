"""Berths: memory of a target that sources on its node write chunks into.

To make an object in Ray's store, to find it and to let go of it takes longer than to copy 16 MiB.
So a target that is sent chunk after chunk keeps one object, and lends parts of it: with its request
for a chunk it names a berth, the source copies the chunk there, and answers with the berth's mark.

A berth is lent to one request at a time, and written only by the one it is lent to. If that request
ends in any other way than with its answer, the source may still be writing: the whole area is then
given up, and its memory lasts until nobody has it open. The mark stands behind the data: a source
that wrote anywhere but where the target reads is found out.

Everything here is for one event loop. Where the memory comes from is the caller's ``Memory``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mell_ray.migration.transports.base import TransportError

BERTHS = 2  # as many chunks as one migration has on their way
MIN_BYTES = 128 << 10  # Ray sends less than that with the answer itself
IDLE_S = 10.0  # an area unused for so long is given back
PAUSE_S = 60.0  # before the next try, where there was no memory for an area
MARK_BYTES = 64
# Copied where it stands below the one, by two threads from the other on.
THREAD_BYTES, TWO_THREADS_BYTES = 512 << 10, 4 << 20
REMEMBERED = 256


class Memory(Protocol):
    """Memory that processes of one node share."""

    async def create(self, nbytes: int) -> tuple[Any, np.ndarray] | None:
        """A picklable ticket, and the memory as uint8, readable. None: there is no room."""
        ...

    async def open(self, ticket: Any) -> Opened | None:
        """What a ticket from another process stands for. None: it is not on this node."""
        ...


class Opened(Protocol):
    """Somebody else's area. Its memory stays what it is for as long as this is held."""

    @property
    def data(self) -> np.ndarray:
        """uint8, writable; not to be held without its owner."""
        ...


@dataclass(frozen=True, slots=True)
class Berth:
    """Room for one chunk. ``ticket``: opens the area; None for a source that has it open."""

    area: int
    start: int
    nbytes: int
    mark: int
    ticket: Any


@dataclass(frozen=True, slots=True)
class Landed:
    """The parcel of a chunk that lies in its berth."""

    mark: int
    nbytes: int


@dataclass(slots=True, eq=False)
class _Area:
    number: int
    ticket: Any
    data: np.ndarray
    berth_bytes: int
    free: list[int] = field(default_factory=lambda: list(range(BERTHS)))
    known: set[str] = field(default_factory=set)  # sources that have it open


class Berths:
    """The target's half. ``max_bytes``: the largest area."""

    def __init__(self, memory: Memory, max_bytes: int) -> None:
        self._memory = memory
        self._max_bytes = max_bytes
        self._area: _Area | None = None
        self._lent: dict[int, _Area] = {}  # by mark
        self._elsewhere: dict[str, None] = {}  # sources that cannot open it
        self._numbers = itertools.count(time.time_ns())  # never used by another process here
        self._making: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._wanted_at = -float("inf")
        self._not_before = -float("inf")

    @contextmanager
    def lend(self, peer: str, nbytes: int) -> Iterator[Berth | None]:
        """A berth for as long as a chunk is asked for, received and taken in. None: the chunk is to
        come as an object of its own."""
        area = self._suitable(peer, nbytes)
        if area is None:
            yield None
            return
        index = area.free.pop()
        stride = area.berth_bytes + MARK_BYTES
        berth = Berth(
            area.number,
            index * stride,
            nbytes,
            next(self._numbers),
            None if peer in area.known else area.ticket,
        )
        self._lent[berth.mark] = area
        try:
            yield berth
        except BaseException:
            if self._area is area:
                self._area = None
            raise
        else:
            area.free.append(index)
        finally:
            del self._lent[berth.mark]
            self._rest()

    def received(self, peer: str, berth: Berth, parcel: Any) -> Any:
        """The bytes of what came for ``berth``: there, or as an object after all.

        Raises:
            TransportError: the source wrote, but not here.
        """
        area = self._lent[berth.mark]
        if not isinstance(parcel, Landed):
            area.known.discard(peer)
            if berth.ticket is not None:
                self._avoid(peer)
            return parcel
        area.known.add(peer)
        if (
            parcel.mark != berth.mark
            or parcel.nbytes > berth.nbytes
            or not _marked(area.data, berth)
        ):
            self._avoid(peer)
            raise TransportError(f"what {peer} sent is not in the memory it was lent")
        return [area.data[berth.start : berth.start + parcel.nbytes]]

    def _suitable(self, peer: str, nbytes: int) -> _Area | None:
        if nbytes < MIN_BYTES or peer in self._elsewhere:
            return None
        area = self._area
        if area is not None and nbytes <= area.berth_bytes:
            return area if area.free else None
        loop = asyncio.get_running_loop()
        now = loop.time()
        # One chunk alone is not worth an area.
        wanted_before, self._wanted_at = self._wanted_at, now
        berth_bytes = 1 << (nbytes - 1).bit_length()
        if (
            now - wanted_before < IDLE_S
            and now >= self._not_before
            and BERTHS * berth_bytes <= self._max_bytes
            and self._making is None
        ):
            self._making = loop.create_task(self._make(berth_bytes))
        return None

    async def _make(self, berth_bytes: int) -> None:
        try:
            made = await self._memory.create(BERTHS * (berth_bytes + MARK_BYTES))
            if made is None:
                self._not_before = asyncio.get_running_loop().time() + PAUSE_S
                return
            self._area = _Area(next(self._numbers), *made, berth_bytes)
            self._rest()
        finally:
            self._making = None

    def _avoid(self, peer: str) -> None:
        self._elsewhere[peer] = None
        if len(self._elsewhere) > REMEMBERED:
            del self._elsewhere[next(iter(self._elsewhere))]

    def _rest(self) -> None:
        """Give the area back if nothing lands for a while from now on."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._give_back)

    def _give_back(self) -> None:
        self._idle = None
        if not self._lent:
            self._area = None


class BerthWriter:
    """The source's half."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._open: dict[str, tuple[int, Opened]] = {}  # by target: area
        self._idle: dict[str, asyncio.TimerHandle] = {}

    async def write(self, peer: str, berth: Berth, pieces: list[np.ndarray]) -> Landed | None:
        """Copy ``pieces`` (uint8) into a berth of ``peer``. None: it is out of reach."""
        nbytes = sum(len(piece) for piece in pieces)
        if nbytes > berth.nbytes:
            return None
        opened = await self._opened(peer, berth)
        if opened is None:
            return None
        if nbytes < THREAD_BYTES:
            _copy(opened, berth.start, pieces)
        else:
            shares = _shares(berth.start, pieces, nbytes)
            await asyncio.gather(
                *(asyncio.to_thread(_copy, opened, start, share) for start, share in shares)
            )
        _mark(opened.data, berth)
        self._rest(peer)
        return Landed(berth.mark, nbytes)

    async def _opened(self, peer: str, berth: Berth) -> Opened | None:
        area, opened = self._open.get(peer, (0, None))
        if area == berth.area:
            return opened
        self._open.pop(peer, None)
        if berth.ticket is None:
            return None
        opened = await self._memory.open(berth.ticket)
        if opened is not None:
            self._open[peer] = berth.area, opened
        return opened

    def _rest(self, peer: str) -> None:
        if peer in self._idle:
            self._idle[peer].cancel()
        loop = asyncio.get_running_loop()
        self._idle[peer] = loop.call_later(IDLE_S, self._close, peer)

    def _close(self, peer: str) -> None:
        self._idle.pop(peer, None)
        self._open.pop(peer, None)


def _shares(
    start: int, pieces: list[np.ndarray], nbytes: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The pieces and where they go, as one share or as two of the same size."""
    if nbytes < TWO_THREADS_BYTES:
        yield start, pieces
        return
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    left = half = nbytes // 2
    for piece in pieces:
        cut = min(left, len(piece))
        first.append(piece[:cut])
        second.append(piece[cut:])
        left -= cut
    yield start, first
    yield start + half, second


def _copy(opened: Opened, start: int, pieces: list[np.ndarray]) -> None:
    # In a thread, which may outlast whoever asked for it: it holds ``opened``, and so the memory.
    for piece in pieces:
        np.copyto(opened.data[start : start + len(piece)], piece)
        start += len(piece)


def _mark(data: np.ndarray, berth: Berth) -> None:
    data[berth.start + berth.nbytes :][:8] = np.frombuffer(np.int64(berth.mark).tobytes(), np.uint8)


def _marked(data: np.ndarray, berth: Berth) -> bool:
    return data[berth.start + berth.nbytes :][:8].tobytes() == np.int64(berth.mark).tobytes()
