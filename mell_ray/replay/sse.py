"""Server-sent events, as far as OpenAI's API uses them: each event is one line of data."""

from __future__ import annotations

from collections.abc import Iterator

DONE = b"[DONE]"


class SseLines:
    """Cuts a byte stream, however it is chunked, into the payloads of its ``data:`` lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Payloads that are complete with this chunk; comments and other fields are left out."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
