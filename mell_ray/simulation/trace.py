"""Request traces: CSV in, rows in order of arrival out.

Columns are ``arrival_s,prompt_tokens,output_tokens`` and, where the source has them, ``session_id``
and ``prefix_hashes`` (space separated, chained, first block first). Other columns are ignored. A
request is known by its row's number in the file, from 0, whatever the order of arrivals.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from mell_ray.errors import ConfigError
from mell_ray.simulation.types import TraceRow

REQUIRED_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL_COLUMNS = ("session_id", "prefix_hashes")

_GZIP_MAGIC = b"\x1f\x8b"


def read_trace(path: str | Path) -> list[TraceRow]:
    """Read a ``.csv`` or ``.csv.gz`` trace; rows come back sorted by arrival, ties in file order.

    Raises:
        ConfigError: no such file, bad gzip, missing column, or a wrong value; the message has
            file, line and column name.
    """
    try:
        with open_text(path, "trace") as stream:
            rows = list(_parse(stream, str(path)))
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


def _parse(stream: TextIO, path: str) -> Iterator[TraceRow]:
    reader = csv.reader(stream)
    try:
        header = [name.strip() for name in next(reader, [])]
        arrival, prompt, output = _required_positions(header, path)
        session, hashes = (
            header.index(name) if name in header else None for name in OPTIONAL_COLUMNS
        )
        width = max(arrival, prompt, output, session or 0, hashes or 0) + 1
        number = 0
        for cells in reader:
            if not cells:
                continue  # a blank line, such as editors leave at the end
            if len(cells) < width:
                column = header[len(cells)]
                raise _bad(path, reader.line_num, column, "is missing: the line is too short")
            try:
                at, known, made = float(cells[arrival]), int(cells[prompt]), int(cells[output])
                good = 0.0 <= at < float("inf") and known > 0 and made > 0
            except ValueError:
                good = False
            if not good:
                at, known, made = _explain(cells, (arrival, prompt, output), path, reader.line_num)
            yield TraceRow(
                number,
                at,
                known,
                made,
                cells[session] if session is not None else "",
                tuple(cells[hashes].split()) if hashes is not None else (),
            )
            number += 1
    except csv.Error as error:
        raise ConfigError(f"trace {path}, line {reader.line_num}: not valid CSV: {error}") from None


def _required_positions(header: Sequence[str], path: str) -> tuple[int, int, int]:
    if not header:
        raise ConfigError(f"trace {path}: the file is empty; the first line names the columns")
    for name in REQUIRED_COLUMNS:
        if name not in header:
            raise ConfigError(
                f"trace {path}, line 1: no column {name!r}; the first line must name "
                f"{', '.join(REQUIRED_COLUMNS)}, this one has: {', '.join(header)}"
            )
        if header.count(name) > 1:
            raise ConfigError(f"trace {path}, line 1: column {name!r} stands there twice")
    arrival, prompt, output = (header.index(name) for name in REQUIRED_COLUMNS)
    return arrival, prompt, output


def _bad(path: str, line: int, column: str, problem: str) -> ConfigError:
    return ConfigError(f"trace {path}, line {line}, column {column}: {problem}")


def _explain(
    cells: Sequence[str], positions: tuple[int, int, int], path: str, line: int
) -> tuple[float, int, int]:
    """The slow reading of one line: finds the wrong cell, or accepts counts such as '374.0'."""
    numbers = []
    for column, position in zip(REQUIRED_COLUMNS, positions, strict=True):
        cell = cells[position]
        try:
            number = float(cell)
        except ValueError:
            raise _bad(path, line, column, f"{cell!r} is not a number") from None
        if not abs(number) < float("inf"):
            raise _bad(path, line, column, f"{cell!r} is not a finite number")
        if column != "arrival_s" and (number <= 0 or number != int(number)):
            raise _bad(path, line, column, f"{cell!r} is not a whole number of at least 1")
        if number < 0:
            raise _bad(path, line, column, f"{cell!r} is negative")
        numbers.append(number)
    return numbers[0], int(numbers[1]), int(numbers[2])


def write_trace(path: str | Path, rows: Iterable[TraceRow]) -> None:
    """Write rows as a trace that `read_trace` reads back equal; ``.gz`` in the name zips it.

    Raises:
        ConfigError: the file cannot be written.
    """
    from mell_ray.simulation.eventlog import open_output

    ordered = sorted(rows, key=lambda row: row.request)
    columns = list(REQUIRED_COLUMNS)
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
