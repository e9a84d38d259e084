"""Requests that wait for room: highest priority first, then by fair share, then by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from mell_ray.scheduler.state import Request

_Rank = tuple[int, float, int]
OVERTAKE_LIMIT = 64  # requests placed past the one at the front before it blocks the line


class WaitingLine:
    """A request at the front that is too large for the room there is may be overtaken a bounded
    number of times; then the line stands still until it fits. So small requests use the room, and
    none starves."""

    def __init__(self) -> None:
        self._line: list[tuple[int, float, int, Request]] = []  # a rank and whose it is

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in self._line)

    def __contains__(self, request: Request) -> bool:
        return self._position(request) is not None

    def _position(self, request: Request) -> int | None:
        position = bisect_left(self._line, _rank(request))  # a rank sorts before its entry
        found = position < len(self._line) and self._line[position][3] is request
        return position if found else None

    def add(self, request: Request, now: float) -> None:
        request.since = now
        insort(self._line, (*_rank(request), request))

    def remove(self, request: Request) -> None:
        """Does nothing if the request does not wait."""
        position = self._position(request) if self._line else None
        if position is not None:
            del self._line[position]

    def from_the_end(self) -> Iterator[Request]:
        """Those without a place in sight, last in line first."""
        return (entry[3] for entry in reversed(self._line) if entry[3].plan is None)

    def unplaced(self, count: int) -> list[Request]:
        """Up to ``count`` requests from the front that have no place in sight."""
        return list(islice((entry[3] for entry in self._line if entry[3].plan is None), count))

    def _head(self) -> Request | None:
        """The first request that has no place in sight."""
        return next((entry[3] for entry in self._line if entry[3].plan is None), None)

    def blocked(self, request: Request) -> bool:
        """Whether the one at the front has been overtaken too often to be passed again."""
        head = self._head()
        if head is None or head.overtaken < OVERTAKE_LIMIT:
            return False
        return _rank(head) < _rank(request)

    def overtake(self, request: Request) -> None:
        """Note that ``request`` has been placed before the one at the front."""
        head = self._head()
        if head is not None and _rank(head) < _rank(request):
            head.overtaken += 1


def _rank(request: Request) -> _Rank:
    return -request.priority, request.tag, request.order
