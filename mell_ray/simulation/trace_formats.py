"""The shapes in which traces come: our own columns, and files as others publish them.

A file is a table with a header (CSV) or one JSON object a line. Which format it has is told by the
names of its columns alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from mell_ray.errors import ConfigError

#: An arrival from here on is a date (Unix time), not seconds from the beginning of a trace.
DATES_FROM_S = 1e8


@dataclass(frozen=True, slots=True)
class Format:
    """Names of the columns that mean something. ``second``: what a second is in ``arrival``."""

    arrival: str
    prompt: str
    output: str
    session: str = ""
    hashes: str = ""
    second: float = 1.0
    failures_without_output: bool = False  # a request of 0 output tokens is one that failed

    @property
    def required(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output


OWN = Format("arrival_s", "prompt_tokens", "output_tokens", "session_id", "prefix_hashes")
AZURE = Format("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = Format(
    "Timestamp",
    "Request tokens",
    "Response tokens",
    "Session ID",
    failures_without_output=True,
)
MOONCAKE = Format("timestamp", "input_length", "output_length", hashes="hash_ids", second=1000.0)

FORMATS = (OWN, AZURE, BURSTGPT, MOONCAKE)

#: (line number from 1, cells in the order of the header)
Lines = Iterator[tuple[int, Sequence[str]]]


def find_format(header: Sequence[str]) -> Format:
    """The format whose required columns ``header`` has; our own where it has those of none."""
    return next((known for known in FORMATS if set(known.required) <= set(header)), OWN)


def read_table(stream: TextIO, path: str) -> tuple[list[str], Lines]:
    """(header, lines) of a CSV file with a header, or of JSON objects, one a line.

    Raises:
        ConfigError: neither, also while the lines are read.
    """
    begin = stream.read(1)
    while begin.isspace():
        begin = stream.read(1)
    stream.seek(0)
    if begin == "{":
        return _read_jsonl(stream, path)
    return _read_csv(stream, path)


def _read_csv(stream: TextIO, path: str) -> tuple[list[str], Lines]:
    reader = csv.reader(stream)

    def lines() -> Lines:
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):  # not a blank line, as editors leave them
                    yield reader.line_num, cells
        except csv.Error as error:
            number = reader.line_num
            raise ConfigError(f"trace {path}, line {number}: not valid CSV: {error}") from None

    found = lines()
    _, header = next(found, (0, []))
    return [name.strip() for name in header], found


def _read_jsonl(stream: TextIO, path: str) -> tuple[list[str], Lines]:
    """The header is the keys of the first object, of which others may have fewer or more."""

    def objects() -> Iterator[tuple[int, dict[str, object]]]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"trace {path}, line {number}: not JSON: {error}") from None
            if not isinstance(found, dict):
                raise ConfigError(f"trace {path}, line {number}: not a JSON object")
            yield number, found

    rows = objects()
    number, first = next(rows, (1, {}))
    header = list(first)

    def lines() -> Lines:
        yield number, [_cell(first[name]) for name in header]
        for line, row in rows:
            yield line, [_cell(row.get(name, "")) for name in header]

    return header, lines()


def _cell(value: object) -> str:
    """A JSON value as a cell; lists are separated by spaces, as ``prefix_hashes`` are."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def parse_time(cell: str, second: float) -> float:
    """Seconds, from a number or from a date in ISO 8601 (without a zone: UTC).

    Raises:
        ValueError: neither.
    """
    try:
        return float(cell) / second
    except ValueError:
        date = datetime.fromisoformat(cell.strip())
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def unix_seconds(latest: float) -> float:
    """What a second is in Unix times up to ``latest``: of seconds, milli-, micro- or nanoseconds.

    Seconds have eleven digits only after the year 5138.
    """
    second = 1.0
    while latest / second >= 1e11:
        second *= 1000.0
    return second
