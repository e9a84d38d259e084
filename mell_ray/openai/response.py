"""Response bodies of the OpenAI API: JSON objects, and server-sent events for streams.

A stream sends one event per token and choice, so chunks are not built as objects: all but the new
text is constant per choice and encoded once. JSON is ASCII, so that no client splits an event at
a Unicode line separator inside the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal

from mell_ray.engine.types import FinishReason
from mell_ray.errors import ServerError
from mell_ray.openai.errors import error_body
from mell_ray.openai.logprobs import chat_logprobs, completion_logprobs
from mell_ray.openai.text import LogprobEntry, TextPiece
from mell_ray.openai.tool_calls import CallDelta

SSE_DONE = b"data: [DONE]\n\n"

ApiFinishReason = Literal["stop", "length", "tool_calls"]

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_quote = json.encoder.encode_basestring_ascii


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event that carries a JSON object."""
    return f"data: {_encode(body)}\n\n".encode("ascii")


def sse_error(error: BaseException) -> bytes:
    """The event that tells a client of a failure after the headers were sent.

    OpenAI's client raises an ``APIError`` on it.
    """
    return sse(error_body(error))


def finish_reason(reason: FinishReason, error: str | None = None) -> ApiFinishReason:
    """The engine's reason in the API's words.

    :raises ServerError: the choice did not come to its end; ``error`` is the engine's message.
    """
    if reason == "stop" or reason == "length":
        return reason
    if reason == "abort":
        raise ServerError(error or "the request was aborted before it was finished", code="aborted")
    raise ServerError(error or "the engine failed to finish the request", code="engine_error")


def system_fingerprint(*parts: str) -> str:
    """Same parts (model, revision, version, ...), same fingerprint."""
    return "fp_" + blake2b("\0".join(parts).encode(), digest_size=5).hexdigest()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_card(model: str, created: int, max_model_len: int | None = None) -> dict[str, Any]:
    """One entry of ``/v1/models``; ``max_model_len`` is an addition that vLLM's clients know."""
    card = {"id": model, "object": "model", "created": created, "owned_by": "mell-ray"}
    return card if max_model_len is None else {**card, "max_model_len": max_model_len}


def model_list(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(cards)}


class Choice:
    """Collects the pieces of one choice for a response that is not streamed.

    :param echo: text that the choice begins with.
    :param logprobs: whether the request asked for log-probabilities.
    """

    __slots__ = ("_texts", "calls", "completion_tokens", "finish_reason", "index", "logprobs")

    def __init__(self, index: int, *, echo: str = "", logprobs: bool = False) -> None:
        self.index = index
        self.logprobs: list[LogprobEntry] | None = [] if logprobs else None
        self.finish_reason: ApiFinishReason | None = None  # set by the caller, at the end
        self.completion_tokens = 0
        self.calls: list[dict[str, Any]] = []  # as the response has them
        self._texts = [echo]

    def add(self, piece: TextPiece) -> None:
        self.completion_tokens += len(piece.token_ids)
        self._texts.append(piece.text)
        if self.logprobs is not None:
            self.logprobs += piece.logprobs

    def add_call(self, delta: CallDelta) -> None:
        if delta.name is not None:
            self.calls.append(_first_part(delta))
        else:
            self.calls[delta.index]["function"]["arguments"] += delta.arguments

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def message(self) -> dict[str, Any]:
        """The message of a chat; without content where it only calls tools."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        if not self.calls:
            return message
        return {**message, "content": self.text or None, "tool_calls": self.calls}


def chat_response(
    id: str,
    created: int,
    model: str,
    choices: Sequence[Choice],
    prompt_tokens: int,
    *,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Body of a chat completion; completion tokens are summed over the choices."""
    body = _envelope("chat.completion", id, created, model, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "message": choice.message(),
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    body["usage"] = usage(prompt_tokens, sum(choice.completion_tokens for choice in choices))
    return body


def completion_response(
    id: str,
    created: int,
    model: str,
    choices: Sequence[Choice],
    prompt_tokens: int,
    *,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Body of a text completion; completion tokens are summed over the choices."""
    body = _envelope("text_completion", id, created, model, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None if choice.logprobs is None else completion_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    body["usage"] = usage(prompt_tokens, sum(choice.completion_tokens for choice in choices))
    return body


def _first_part(delta: CallDelta) -> dict[str, Any]:
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"id": delta.id, "type": "function", "function": function}


def _envelope(
    kind: str, id: str, created: int, model: str, fingerprint: str | None
) -> dict[str, Any]:
    return {
        "id": id,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
    }


class _Chunker:
    """What all chunks of one streamed response share, encoded once."""

    kind: str

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        include_usage: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        envelope = _encode(_envelope(self.kind, id, created, model, fingerprint))
        self._head = f"data: {envelope[:-1]}," + '"choices":['
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def usage(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last chunk before ``[DONE]`` where the client asked for usage."""
        totals = _encode(usage(prompt_tokens, completion_tokens))
        return f'{self._head}],"usage":{totals}}}\n\n'.encode("ascii")

    def extra(self, name: str, value: Any) -> bytes:
        """A chunk without choices, as ``usage`` is one, that carries an addition of ours."""
        return f'{self._head}],"{name}":{_encode(value)}}}\n\n'.encode("ascii")

    def _chunk(self, choice: str) -> bytes:
        return f"{self._head}{choice}{self._tail}".encode("ascii")


class ChatChunker(_Chunker):
    """Events of a streamed chat completion: ``role``, then ``delta`` for each piece, ``finish``
    for each choice, and ``usage`` if asked for."""

    kind = "chat.completion.chunk"

    def role(self, choice: int) -> bytes:
        return self._chunk(
            f'{{"index":{choice},"delta":{{"role":"assistant","content":"","refusal":null}},'
            '"logprobs":null,"finish_reason":null}'
        )

    def delta(self, choice: int, piece: TextPiece) -> bytes:
        """Empty bytes if the piece releases nothing."""
        if not piece:
            return b""
        logprobs = _encode(chat_logprobs(piece.logprobs)) if piece.logprobs else "null"
        return self._chunk(
            f'{{"index":{choice},"delta":{{"content":{_quote(piece.text)}}},'
            f'"logprobs":{logprobs},"finish_reason":null}}'
        )

    def finish(self, choice: int, reason: ApiFinishReason) -> bytes:
        return self._chunk(
            f'{{"index":{choice},"delta":{{}},"logprobs":null,"finish_reason":"{reason}"}}'
        )

    def call(self, choice: int, delta: CallDelta) -> bytes:
        """A part of a tool call."""
        part: dict[str, Any] = {"function": {"arguments": delta.arguments}}
        if delta.name is not None:
            part = _first_part(delta)
        calls = _encode([{"index": delta.index, **part}])
        return self._chunk(
            f'{{"index":{choice},"delta":{{"tool_calls":{calls}}},'
            '"logprobs":null,"finish_reason":null}'
        )


class CompletionChunker(_Chunker):
    """Events of a streamed text completion: ``echo`` if asked for, then as for a chat."""

    kind = "text_completion"

    def echo(self, choice: int, text: str) -> bytes:
        """The prompt as the first text of a choice."""
        return self.delta(choice, TextPiece(text))

    def delta(self, choice: int, piece: TextPiece) -> bytes:
        """Empty bytes if the piece releases nothing."""
        if not piece:
            return b""
        logprobs = _encode(completion_logprobs(piece.logprobs)) if piece.logprobs else "null"
        return self._chunk(
            f'{{"index":{choice},"text":{_quote(piece.text)},'
            f'"logprobs":{logprobs},"finish_reason":null}}'
        )

    def finish(self, choice: int, reason: ApiFinishReason) -> bytes:
        return self._chunk(
            f'{{"index":{choice},"text":"","logprobs":null,"finish_reason":"{reason}"}}'
        )
