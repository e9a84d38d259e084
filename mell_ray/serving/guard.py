"""Who may call, how much a request may send, and how many run at once per key.

The rules are in ``Guard``; ``GuardMiddleware`` applies them to every HTTP request before anything
else sees it. Python callers of the deployment handle are inside the cluster and not asked.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.responses import JSONResponse
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mell_ray.config import AuthConfig, IngressConfig
from mell_ray.errors import (
    AuthenticationError,
    MellError,
    RateLimitError,
    RequestTooLargeError,
)
from mell_ray.openai.errors import error_body, error_headers
from mell_ray.serving.keys import KeyRing
from mell_ray.serving.wire import Share

OPEN_PATHS = frozenset({"/health", "/mell"})  # /mell is a page without data
OPERATOR_PREFIX = "/mell/v1/"
SHARE = "mell.share"  # of the ASGI scope: the caller's Share, or None
_FORGET = 0.1
HOW = "send 'Authorization: Bearer KEY'"


class Guard:
    """The rules of one ingress replica, and the requests it has let in."""

    def __init__(self, auth: AuthConfig, limits: IngressConfig) -> None:
        """Raises ConfigError: a file or variable that should hold keys does not."""
        self._clients = KeyRing(auth.clients, "mell.auth.clients")
        self._operators = KeyRing(auth.operators, "mell.auth.operators")
        self._limits = limits
        self._fair = auth.fair_share
        self._running: Counter[str] = Counter()
        self._usual_s = 1.0  # how long a request with a key has taken lately, a moving mean

    @contextmanager
    def admit(self, method: str, path: str, headers: dict[bytes, bytes]) -> Iterator[Share | None]:
        """Holds the caller's slot while the request runs; gives the caller's share of the fleet,
        where it is shared.

        Raises:
            AuthenticationError: no key, or not a good one for this path.
            RequestTooLargeError: the body is longer than ``max_body_bytes``.
            RateLimitError: the key has ``max_concurrent_per_key`` requests running.
        """
        key_id = self._identify(path, headers.get(b"authorization"))
        length = headers.get(b"content-length", b"")
        if length.isdigit():
            self.check_size(int(length))
        share = self.share(key_id)
        most = self._limits.max_concurrent_per_key
        if key_id is None or most is None or method != "POST" or not path.startswith("/v1/"):
            yield share
            return
        if self._running[key_id] >= most:
            raise RateLimitError(
                f"{most} requests with this API key are running; wait until one has ended",
                retry_after_s=max(1, min(60, round(self._usual_s / most))),
            )
        self._running[key_id] += 1
        started = time.monotonic()
        try:
            yield share
        finally:
            self._usual_s += (time.monotonic() - started - self._usual_s) * _FORGET
            self._running[key_id] -= 1
            if not self._running[key_id]:
                del self._running[key_id]

    def share(self, key_id: str | None = None) -> Share | None:
        """What a caller has of the fleet, where it is shared; None: of those without a key."""
        if not self._fair:
            return None
        return Share() if key_id is None else Share(key_id, self._clients.weight(key_id))

    def check_size(self, num_bytes: int) -> None:
        most = self._limits.max_body_bytes
        if num_bytes > most:
            raise RequestTooLargeError(f"the request body is longer than {most} bytes; shorten it")

    def _identify(self, path: str, authorization: bytes | None) -> str | None:
        """The id of the caller's key; None where none is needed."""
        operator_call = path.startswith(OPERATOR_PREFIX) and bool(self._operators)
        needed = self._operators if operator_call else self._clients
        if path in OPEN_PATHS or not needed:
            return None
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationError(f"an API key is needed; {HOW}")
        key = key.strip()
        # An operator's key opens everything. Both lists are searched, whichever has it.
        found = [self._operators.find(key), None if operator_call else self._clients.find(key)]
        for key_id in found:
            if key_id is not None:
                return key_id
        kind = "an operator's" if operator_call else "a known"
        raise AuthenticationError(f"the key in the Authorization header is not {kind} API key")


class GuardMiddleware:
    """Asks the replica's ``guard`` about each request, and counts the bytes of its body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guard: Guard = serve.get_replica_context().servable_object.guard
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            with guard.admit(scope["method"], path, dict(scope["headers"])) as share:
                scope[SHARE] = share
                await self._app(scope, _counted(receive, guard), send)
        except (AuthenticationError, RequestTooLargeError, RateLimitError) as error:
            await _answer(error)(scope, receive, send)


def _counted(receive: Receive, guard: Guard) -> Receive:
    """A body without a length in its headers is measured as it comes."""
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        guard.check_size(num_bytes)
        return message

    return counted


def _answer(error: MellError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status_code, error_headers(error))
