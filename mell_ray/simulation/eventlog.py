"""The event log: everything a simulation did, one JSON object a line, in order of time.

=========== ==================================== ==================================================
``event``   fields beside ``t`` (seconds)        meaning
=========== ==================================== ==================================================
gpu_open    gpu, capacity_tokens                 the GPU can hold requests from now on
gpu_close   gpu                                  it is empty and given back
place       request, gpu, tokens                 the request holds ``tokens`` of KV there from now
grow        request, gpu, tokens                 it holds ``tokens`` from now (reported per epoch)
migrate     request, src, dst, tokens, mode      it left ``src`` and holds ``tokens`` on ``dst``
preempt     request, gpu, tokens                 it was taken off; its tokens are kept, its KV lost
finish      request, gpu, tokens                 it ended with ``tokens`` = prompt + output
=========== ==================================== ==================================================

``request`` is the number of the request's row in the trace, from 0. The same run writes the same
bytes, zipped or not.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mell_ray.errors import ConfigError


@contextmanager
def open_output(path: str | Path) -> Iterator[TextIO]:
    """A text file to write, zipped where its name ends in ``.gz``; its directory is made.

    Raises:
        ConfigError: it cannot be opened.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    with raw:
        if path.suffix != ".gz":
            with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as text:
                yield text
            return
        # No name and no time in the gzip header: the same run gives the same bytes.
        with (
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as zipped,
            io.TextIOWrapper(zipped, encoding="utf-8", newline="\n") as text,
        ):
            yield text


def check_outputs(*paths: str | Path | None) -> None:
    """Before a long run: whether its results can be written. None and ``-`` are no files.

    Raises:
        ConfigError: a file cannot be opened; what it holds is left as it is.
    """
    for given in paths:
        if given is None or str(given) == "-":
            continue
        path = Path(given)
        known = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
            if not known:
                path.unlink()
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None


class JsonlEventLog:
    """Writes events to a text stream; counts them.

    Times must not go back: a log out of order would be useless to an auditor, so it is refused
    where it is made.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_t = 0.0
        self._encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
        self.lines = 0

    def emit(self, t: float, event: str, **fields: Any) -> None:
        """Write one line.

        Raises:
            ValueError: ``t`` is before the last event's.
        """
        if t < self._last_t:
            raise ValueError(f"event {event!r} at {t} s after one at {self._last_t} s")
        self._last_t = t
        line = f'{{"t":{round(t, 6)!r},"event":"{event}"'
        for name, value in fields.items():
            # A long run has millions of lines, nearly all of integers: no encoder for those.
            text = value if type(value) is int else self._encode(value)
            line += f',"{name}":{text}'
        self._stream.write(line + "}\n")
        self.lines += 1


@contextmanager
def event_log(path: str | Path) -> Iterator[JsonlEventLog]:
    """The log at ``path`` (``.jsonl`` or ``.jsonl.gz``), closed and complete on leaving."""
    with open_output(path) as stream:
        yield JsonlEventLog(stream)


def read_events(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, event) of a log, zipped or not.

    Raises:
        ConfigError: unreadable, or a line that is not a JSON object; the message names the line.
    """
    from mell_ray.simulation.trace import open_text

    try:
        with open_text(path, "event log") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, _parse_line(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"event log {path}: cannot read it: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"event log {path}: not JSON lines in UTF-8 (or their gzip)") from None


def _parse_line(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"event log {path}, line {number}: not JSON: {error.msg}") from None
    if not isinstance(event, dict):
        raise ConfigError(f"event log {path}, line {number}: not a JSON object")
    return event
