"""Requests that wait for room: highest priority first, then in order of arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from mell_ray.scheduler.state import Request

OVERTAKE_LIMIT = 64  # requests placed past the one at the front before it blocks the line


class WaitingLine:
    """A request at the front that is too large for the room there is may be overtaken a bounded
    number of times; then the line stands still until it fits. So small requests use the room, and
    none starves."""

    def __init__(self) -> None:
        self._line: list[tuple[int, int, Request]] = []

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._line)

    def __contains__(self, request: Request) -> bool:
        entry = (-request.priority, request.order, request)
        position = bisect_left(self._line, entry[:2], key=lambda e: e[:2])
        return position < len(self._line) and self._line[position][2] is request

    def add(self, request: Request, now: float) -> None:
        request.since = now
        insort(self._line, (-request.priority, request.order, request))

    def remove(self, request: Request) -> None:
        """Does nothing if the request does not wait."""
        if not self._line:
            return
        position = bisect_left(self._line, (-request.priority, request.order))
        if position < len(self._line) and self._line[position][2] is request:
            del self._line[position]

    def unplaced(self, count: int) -> list[Request]:
        """Up to ``count`` requests from the front that have no place in sight."""
        return list(islice((r for _, _, r in self._line if r.plan is None), count))

    def _head(self) -> Request | None:
        """The first request that has no place in sight."""
        return next((r for _, _, r in self._line if r.plan is None), None)

    def blocked(self, request: Request) -> bool:
        """Whether the one at the front has been overtaken too often to be passed again."""
        head = self._head()
        return head is not None and self._before(head, request) and head.overtaken >= OVERTAKE_LIMIT

    def overtake(self, request: Request) -> None:
        """Note that ``request`` has been placed before the one at the front."""
        head = self._head()
        if head is not None and self._before(head, request):
            head.overtaken += 1

    @staticmethod
    def _before(one: Request, other: Request) -> bool:
        return (-one.priority, one.order) < (-other.priority, other.order)
