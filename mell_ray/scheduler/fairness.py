"""Weighted fair sharing among tenants: start-time fair queueing over the KV that requests may take.

Each request gets a *start tag* in virtual time when it arrives: that of its tenant's last request
plus that request's cost over the tenant's weight, but no earlier than the virtual time now, which
is the latest tag that has been placed. Waiting requests are placed in order of their tags. So while
several tenants have requests waiting, each is placed in proportion to its weight, nobody saves up
shares while away, and a tenant's flood delays its own requests only.

A request is charged what it may grow to, and its tenant gets back what it did not use when it ends.
"""

from __future__ import annotations

_REMEMBERED = 4096  # tenants; those behind the virtual time are as good as new and forgotten first


class FairShares:
    """The tenants of one waiting line."""

    def __init__(self) -> None:
        self._now = 0.0  # virtual time
        self._next: dict[str, float] = {}  # earliest tag of the tenant's next request

    def arrived(self, tenant: str, weight: float, cost: float) -> float:
        """The start tag of a request that may take ``cost``."""
        tag = max(self._now, self._next.get(tenant, 0.0))
        self._next[tenant] = tag + cost / weight
        if len(self._next) > _REMEMBERED:
            self._next = {name: at for name, at in self._next.items() if at > self._now}
        return tag

    def placed(self, tag: float) -> None:
        """A request with this tag is no longer waiting."""
        self._now = max(self._now, tag)

    def ended(self, tenant: str, weight: float, unused: float) -> None:
        """A request has ended that did not take ``unused`` of its cost."""
        if tenant in self._next:
            self._next[tenant] -= unused / weight
