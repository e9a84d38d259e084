"""What an ingress does in the background."""

from __future__ import annotations

import contextvars

from mell_ray.serving.links import ReplicaLinks


async def test_what_is_done_after_a_client_has_gone_is_not_part_of_its_request() -> None:
    """Serve finds what to cancel with a request by a context variable."""
    request = contextvars.ContextVar("request", default="none")
    links = ReplicaLinks("namespace", "ingress", lambda *_: None, lambda _: None)

    async def whose() -> str:
        return request.get()

    request.set("of a client that goes")
    assert await links.spawn(whose()) == "none"
