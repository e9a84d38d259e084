"""One request of a replay over HTTP: sends it, stamps what comes back, names what goes wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from mell_ray.errors import ConfigError, MellError
from mell_ray.replay.sse import DONE, SseLines
from mell_ray.replay.types import Failure, Job, Outcome

_MAX_MESSAGE = 300
# A pool looks through all its connections for each request; many small ones keep that short.
_NUM_POOLS = 32
_NUMBERS = re.compile(r"\b(?=[0-9a-f-]*\d)[0-9a-f-]{6,}\b|\d+(?:\.\d+)?")


def check_address(url: str) -> None:
    """Raises ConfigError where ``url`` is no address of a web server."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
        problem = "not an http:// or https:// address"
    except ValueError as error:  # a bad port or IPv6 address
        problem = str(error)
    raise ConfigError(f"--url {url!r}: {problem}; for example http://127.0.0.1:8000")


class Endpoint:
    """An OpenAI-compatible server and a model of it. Use as an async context manager.

    Args:
        url: with or without the trailing ``/v1``.
        timeout_s: a request that is not answered by then has failed.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        check_address(url)
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        certificates = httpx.create_ssl_context()
        try:
            self._pools = [
                httpx.AsyncClient(
                    base_url=self.url,
                    headers=headers,
                    verify=certificates,
                    timeout=None,  # the limit is on the whole request, see `send`
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                )
                for _ in range(_NUM_POOLS)
            ]
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"--url {url}: {error}") from None

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in self._pools:
            await pool.aclose()

    async def model(self, wanted: str | None) -> tuple[str, int | None]:
        """The model to ask, and its context length where the server tells.

        Raises:
            MellError: nobody answers, or it is not an OpenAI-compatible server.
            ConfigError: the server does not have that model.
        """
        try:
            answer = await self._pools[0].get("/v1/models", timeout=30.0)
            if answer.status_code != 200:
                raise MellError(f"{self.url}/v1/models: {_http_failure(answer).message}")
            cards = {str(card["id"]): card for card in answer.json()["data"]}
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise MellError(f"no server answers at {self.url} ({_reason(error)})") from None
        except (ValueError, KeyError, TypeError):
            raise MellError(f"{self.url}/v1/models: not the answer of an OpenAI server") from None
        if not cards:
            raise MellError(f"{self.url}/v1/models: the server has no model")
        name = next(iter(cards)) if wanted is None else wanted
        if name not in cards:
            raise ConfigError(f"--model {name}: the server has {', '.join(cards)}")
        context = cards[name].get("max_model_len")
        return name, context if isinstance(context, int) else None

    async def send(self, job: Job, body: bytes, clock: Callable[[], float]) -> Outcome:
        """Send one request and read its answer to the end. Never raises for a failed request."""
        outcome = Outcome(job, sent_s=clock())
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome.failure = await self._stream(body, outcome, clock)
        except TimeoutError:
            outcome.failure = Failure("timeout", f"no whole answer in {self._timeout_s:g} s")
        except httpx.HTTPError as error:
            phase = "connection failed" if outcome.first_s is None else "connection lost"
            reason = _reason(error)
            outcome.failure = Failure(f"{phase}: {general(reason)}", f"{phase}: {reason}")
        except OSError as error:
            outcome.failure = Failure(f"client: {error.strerror}", f"client: {error}")
        outcome.end_s = clock()
        return outcome

    async def _stream(
        self, body: bytes, outcome: Outcome, clock: Callable[[], float]
    ) -> Failure | None:
        pool = self._pools[outcome.job.number % _NUM_POOLS]
        request = pool.build_request(
            "POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        response = await pool.send(request, stream=True)
        try:
            if response.status_code != 200:
                await response.aread()
                return _http_failure(response)
            return await _read(response, outcome, clock)
        finally:
            await response.aclose()


async def _read(
    response: httpx.Response, outcome: Outcome, clock: Callable[[], float]
) -> Failure | None:
    lines = SseLines()
    counted: int | None = None
    async for chunk in response.aiter_bytes():
        now = clock()
        for payload in lines.feed(chunk):
            if payload == DONE:
                return _check_length(outcome, counted)
            try:
                event = json.loads(payload)
                if "error" in event:
                    return _told("error in the stream", event["error"])
                if _has_piece(event, outcome):
                    outcome.piece(now)
                    outcome.tokens += 1
                if event.get("usage"):
                    counted = int(event["usage"]["completion_tokens"])
            except (ValueError, TypeError, KeyError, AttributeError):
                text = "the stream has an event that is not a completion"
                return Failure(text, text)
    text = "the stream ended without [DONE]"
    return Failure(text, text)


def _has_piece(event: dict[str, Any], outcome: Outcome) -> bool:
    """Whether an event carries text. The end of an answer without text counts as its piece."""
    for choice in event.get("choices") or ():
        if choice.get("text") or (choice.get("finish_reason") and outcome.first_s is None):
            return True
    return False


def _check_length(outcome: Outcome, counted: int | None) -> Failure | None:
    """An answer of another length than the trace's is another load. Only the server can count."""
    if counted is not None:
        outcome.tokens, outcome.counted = counted, True
        if counted != outcome.job.output_tokens:
            return Failure(
                "answer of another length",
                f"{counted} tokens, asked for {outcome.job.output_tokens}",
            )
    if outcome.first_s is None:
        return Failure("empty answer", "the stream had no text")
    return None


def _http_failure(response: httpx.Response) -> Failure:
    try:
        answer = response.json()
        for key in ("error", "message", "detail"):  # OpenAI's, older vLLM's, FastAPI's
            if answer.get(key):
                return _told(f"HTTP {response.status_code}", answer[key])
    except (ValueError, AttributeError):
        pass
    text = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    return Failure(text, text)


def _told(where: str, error: Any) -> Failure:
    """A failure in the server's own words."""
    message = error.get("message") if isinstance(error, dict) else error
    text = str(message)[:_MAX_MESSAGE]
    return Failure(f"{where}: {general(text)}", f"{where}: {text}")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def general(message: str) -> str:
    """A message without its numbers and ids, so that equal failures can be counted together."""
    return _NUMBERS.sub("#", message)
