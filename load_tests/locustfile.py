"""Locust users for interactive load: chats and completions, streamed, timed token by token.

    pip install -c constraints.txt -e '.[load]'
    locust -f load_tests/locustfile.py --host http://127.0.0.1:8000

Beside Locust's own rows (whole answers), each kind of request has rows ``TTFT`` and ``ITL``: one
entry per answer, the time to its first token and the mean time between its tokens. A request that
fails, also in the middle of its stream, is a failure with the server's message. Environment:
``MELL_MODEL`` (default: the server's first), ``MELL_MAX_TOKENS`` (64), ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from locust import HttpUser, between, task  # type: ignore[import-not-found]

MAX_TOKENS = int(os.environ.get("MELL_MAX_TOKENS", "64"))
TOPICS = ("the weather", "a garden", "an old house", "the sea", "music", "a long walk", "bread")
TIMEOUT_S = 300.0  # without a byte


class _StreamError(Exception):
    """The answer did not come whole."""


class _StreamingUser(HttpUser):
    abstract = True
    wait_time = between(0.5, 3.0)

    def on_start(self) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.random = random.Random(random.random())
        self.model = os.environ.get("MELL_MODEL") or self._first_model()

    def _first_model(self) -> str:
        answer = self.client.get("/v1/models", headers=self.headers)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])

    def ask(self, path: str, name: str, fields: dict[str, Any]) -> None:
        """One streamed request; its events go to Locust's statistics."""
        body = {"model": self.model, "max_tokens": MAX_TOKENS, "stream": True, **fields}
        start = time.perf_counter()
        with self.client.post(
            path,
            json=body,
            headers=self.headers,
            timeout=TIMEOUT_S,
            stream=True,
            catch_response=True,
            name=name,
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return
            stamps: list[float] = []
            try:
                stamps.extend(_stamps(answer.iter_lines(chunk_size=None)))
            except (_StreamError, OSError, ValueError) as error:
                answer.failure(str(error))
                return
            answer.request_meta["response_time"] = (time.perf_counter() - start) * 1e3
            answer.success()
        if stamps:
            self._report("TTFT", name, stamps[0] - start)
        if len(stamps) > 1:
            self._report("ITL", name, (stamps[-1] - stamps[0]) / (len(stamps) - 1))

    def _report(self, kind: str, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=seconds * 1e3,
            response_length=0,
            exception=None,
            context={},
        )


def _stamps(lines: Iterator[bytes]) -> Iterator[float]:
    """When each piece of text came; ends with the answer.

    Raises:
        _StreamError: the stream has an error, or ends before the answer does.
    """
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise _StreamError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                yield time.perf_counter()
    raise _StreamError("the stream ended without [DONE]")


class ChatUser(_StreamingUser):
    """Talks: each question carries the conversation so far, up to a few turns."""

    weight = 3
    turns = 4

    def on_start(self) -> None:
        super().on_start()
        self.messages: list[dict[str, str]] = []

    @task
    def chat(self) -> None:
        if len(self.messages) >= self.turns:
            self.messages = []
        topic = self.random.choice(TOPICS)
        self.messages.append({"role": "user", "content": f"Tell me more of {topic}."})
        self.ask("/v1/chat/completions", "chat", {"messages": self.messages})


class CompletionUser(_StreamingUser):
    """Asks for a continuation of a text of its own."""

    weight = 1

    @task
    def complete(self) -> None:
        words = " ".join(self.random.choices(TOPICS, k=self.random.randint(2, 40)))
        self.ask("/v1/completions", "completion", {"prompt": words})
