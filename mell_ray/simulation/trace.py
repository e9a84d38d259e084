"""Request traces: files in, rows in order of arrival out.

Columns are ``arrival_s,prompt_tokens,output_tokens`` and, where the source has them, ``session_id``
and ``prefix_hashes`` (space separated, chained, first block first), or those of a published trace,
see ``trace_formats``. Other columns are ignored. A request is known by its row's number in the
file, from 0, whatever the order of arrivals.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TextIO

from mell_ray.errors import ConfigError
from mell_ray.simulation.trace_formats import (
    DATES_FROM_S,
    OWN,
    Format,
    find_format,
    parse_time,
    read_table,
    unix_seconds,
)
from mell_ray.simulation.types import TraceRow

_GZIP_MAGIC = b"\x1f\x8b"


def read_trace(path: str | Path, note: Callable[[str], None] | None = None) -> list[TraceRow]:
    """Read a trace, zipped or not; rows come back sorted by arrival, ties in file order.

    Dates become seconds of Unix time; see `from_first` for those. ``note`` is told in a sentence
    what a reader of figures must know of the file.

    Raises:
        ConfigError: no such file, bad gzip, missing column, or a wrong value; the message has
            file, line and column name.
    """
    try:
        with open_text(path, "trace") as stream:
            rows = list(_parse(stream, str(path), note))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"trace {path}: cannot read it: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path}: not a CSV file in UTF-8 (or its gzip)") from None
    if not rows:
        raise ConfigError(f"trace {path}: no requests in it, only a header")
    rows.sort(key=lambda row: row.arrival_s)
    return rows


@contextmanager
def open_text(path: str | Path, what: str) -> Iterator[TextIO]:
    """A text file to read, zipped or not.

    Gzip is told by the file's first bytes, not by its name. A byte-order mark is dropped.
    ``what`` is what errors call the file.
    """
    path = Path(path)
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == _GZIP_MAGIC
        if not zipped and path.suffix == ".gz":
            raise ConfigError(f"{what} {path}: its name says gzip, its contents are not")
        binary: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
            yield text


def _parse(
    stream: TextIO, path: str, note: Callable[[str], None] | None = None
) -> Iterator[TraceRow]:
    header, lines = read_table(stream, path)
    known = find_format(header)
    arrival, prompt, output = positions = _required_positions(header, known, path)
    session, hashes = (
        header.index(name) if name and name in header else None
        for name in (known.session, known.hashes)
    )
    width = max(arrival, prompt, output, session or 0, hashes or 0) + 1
    failed = 0
    for number, (line, cells) in enumerate(lines):
        if len(cells) < width:
            raise _bad(path, line, header[len(cells)], "is missing: the line is too short")
        try:
            at = float(cells[arrival]) / known.second
            held, made = int(cells[prompt]), int(cells[output])
            good = 0.0 <= at < float("inf") and held > 0 and made > 0
        except ValueError:
            good = False
        if not good:
            if known.failures_without_output and cells[output].strip() in ("0", "0.0"):
                failed += 1
                continue
            at, held, made = _explain(cells, positions, known, path, line)
        yield TraceRow(
            number,
            at,
            held,
            made,
            cells[session] if session is not None else "",
            tuple(cells[hashes].split()) if hashes is not None else (),
        )
    if failed and note is not None:
        note(f"trace {path}: {failed:,} requests without an output had failed and are left out")


def _required_positions(header: Sequence[str], known: Format, path: str) -> tuple[int, int, int]:
    if not header:
        raise ConfigError(f"trace {path}: the file is empty; the first line names the columns")
    for name in known.required:
        if name not in header:
            raise ConfigError(
                f"trace {path}, line 1: no column {name!r}; the first line must name "
                f"{', '.join(known.required)}, this one has: {', '.join(header)}"
            )
        if header.count(name) > 1:
            raise ConfigError(f"trace {path}, line 1: column {name!r} stands there twice")
    arrival, prompt, output = (header.index(name) for name in known.required)
    return arrival, prompt, output


def _bad(path: str, line: int, column: str, problem: str) -> ConfigError:
    return ConfigError(f"trace {path}, line {line}, column {column}: {problem}")


def _explain(
    cells: Sequence[str], positions: tuple[int, int, int], known: Format, path: str, line: int
) -> tuple[float, int, int]:
    """The slow reading of one line: finds the wrong cell, or accepts dates and counts such as
    '374.0'."""
    numbers = []
    for column, position in zip(known.required, positions, strict=True):
        cell = cells[position]
        is_time = column == known.arrival
        try:
            number = parse_time(cell, known.second) if is_time else float(cell)
        except ValueError:
            wanted = "a number, nor a date" if is_time else "a number"
            raise _bad(path, line, column, f"{cell!r} is not {wanted}") from None
        if not abs(number) < float("inf"):
            raise _bad(path, line, column, f"{cell!r} is not a finite number")
        if not is_time and (number <= 0 or number != int(number)):
            advice = "; leave out requests that have none" if number == 0 else ""
            raise _bad(path, line, column, f"{cell!r} is not a whole number of at least 1{advice}")
        if number < 0:
            raise _bad(path, line, column, f"{cell!r} is negative")
        numbers.append(number)
    return numbers[0], int(numbers[1]), int(numbers[2])


def from_first(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows in order of arrival whose arrivals are dates, counted from the first one in seconds.

    A clock of milli-, micro- or nanoseconds is told by the size of its numbers. Rows whose
    arrivals are no dates come back as they are.
    """
    if not rows or rows[0].arrival_s < DATES_FROM_S:
        return list(rows)
    second, first = unix_seconds(rows[0].arrival_s), rows[0].arrival_s
    return [replace(r, arrival_s=round((r.arrival_s - first) / second, 6)) for r in rows]


def write_trace(path: str | Path, rows: Iterable[TraceRow]) -> None:
    """Write rows as a trace that `read_trace` reads back equal; ``.gz`` in the name zips it.

    Raises:
        ConfigError: the file cannot be written.
    """
    from mell_ray.simulation.eventlog import open_output

    ordered = sorted(rows, key=lambda row: row.request)
    columns = list(OWN.required)
    sessions = any(row.session_id for row in ordered)
    hashes = any(row.prefix_hashes for row in ordered)
    columns += ["session_id"] * sessions + ["prefix_hashes"] * hashes
    with open_output(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for row in ordered:
            cells: list[object] = [repr(row.arrival_s), row.prompt_tokens, row.output_tokens]
            cells += [row.session_id] * sessions + [" ".join(row.prefix_hashes)] * hashes
            writer.writerow(cells)
