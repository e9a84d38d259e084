"""Reads Jane Austen's six novels out of the Debian package ``r-cran-janeaustenr`` 1.0.0-1.

The package stores each novel as an R character vector (one element per printed line) in a
lazy-load database. Unpacking that takes a few lines of standard library, so neither R nor an
R-reading package is needed.

The text is in the public domain; the package is under the MIT licence. To obtain the files::

    apt-get download r-cran-janeaustenr=1.0.0-1
    dpkg -x r-cran-janeaustenr_1.0.0-1_all.deb corpus
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
NOVELS = 6
HELD_OUT_SPAN = (0.60, 0.64)

# R's serialization: type in the low byte of an item's flags, big-endian ("XDR") integers.
_STRING_VECTOR = 16
_STRING = 9
_MISSING = -1

_NOT_PROSE = re.compile(
    r"(?i:volume|chapter|finis|the end|(by )?jane austen)\b|\[|\(1[78]|.*modern Brit"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']*(?:--)?\s+(?=[\"'(]*[A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Dr|St|Esq|Messrs|Capt|Col|[A-Z])\.)$")


class CorpusError(Exception):
    """The corpus directory does not hold the expected package."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence, and whether it opens a paragraph."""

    text: str
    opens_paragraph: bool


@dataclass(frozen=True, slots=True)
class Novel:
    """A novel's sentences in reading order, cut in contiguous parts for training and held out."""

    title: str
    train: tuple[tuple[Sentence, ...], ...]
    held_out: tuple[Sentence, ...]


def load_novels(corpus_dir: Path) -> list[Novel]:
    """The six novels found under `corpus_dir`, the root that ``dpkg -x`` extracted to.

    Raises:
        CorpusError: the database is missing or is not the one this code was written for.
    """
    database = corpus_dir / DATABASE
    if not database.is_file():
        raise CorpusError(f"{database} not found: extract r-cran-janeaustenr there with `dpkg -x`")
    novels = [_novel(lines) for lines in read_string_vectors(database.read_bytes())]
    if len(novels) != NOVELS:
        raise CorpusError(f"{database} holds {len(novels)} texts, expected {NOVELS}")
    return novels


def read_string_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database, in file order.

    Each record is a 4-byte length followed by a zlib stream holding one serialized object.
    """
    while database:
        (length,) = struct.unpack_from(">I", database)
        stream = zlib.decompressobj()
        record = stream.decompress(database[4:])
        if len(record) != length:
            raise CorpusError(f"record of {len(record)} bytes announced as {length}")
        yield _string_vector(record)
        database = stream.unused_data


def _string_vector(record: bytes) -> list[str]:
    if not record.startswith(b"X\n"):
        raise CorpusError("record is not R's binary (XDR) serialization")
    version, _, _ = struct.unpack_from(">iii", record, 2)
    at = 14
    if version >= 3:
        (encoding_length,) = struct.unpack_from(">i", record, at)
        at += 4 + encoding_length
    flags, count = struct.unpack_from(">ii", record, at)
    if flags & 0xFF != _STRING_VECTOR:
        raise CorpusError(f"record holds R type {flags & 0xFF}, expected a character vector")
    at += 8
    lines: list[str] = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", record, at)
        if flags & 0xFF != _STRING:
            raise CorpusError(f"element holds R type {flags & 0xFF}, expected a string")
        at += 8
        size = 0 if length == _MISSING else length
        lines.append(record[at : at + size].decode("utf-8"))
        at += size
    return lines


def paragraphs(lines: list[str]) -> list[str]:
    """Printed lines joined into paragraphs, without headings and emphasis marks."""
    blocks = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = (" ".join(block.replace("_", "").split()) for block in blocks)
    return [text for text in joined if " " in text and not _NOT_PROSE.match(text)]


def sentences(paragraph: str) -> list[str]:
    """`paragraph` cut after full stops, question and exclamation marks; quotes stay closed."""
    found: list[str] = []
    start = 0
    for gap in _SENTENCE_END.finditer(paragraph):
        if _ABBREVIATION.search(paragraph[start : gap.start()]):
            continue
        found.append(paragraph[start : gap.end()].strip())
        start = gap.end()
    found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def join(passage: tuple[Sentence, ...] | list[Sentence]) -> str:
    """The passage's text: sentences joined by spaces, paragraphs by blank lines."""
    text = "".join(("\n\n" if s.opens_paragraph else " ") + s.text for s in passage)
    return text.lstrip()


def _novel(lines: list[str]) -> Novel:
    title = next(line.strip().title() for line in lines if line.strip())
    body = paragraphs(lines)[1:] if " " in title else paragraphs(lines)
    low, high = (round(len(body) * share) for share in HELD_OUT_SPAN)
    return Novel(
        title=title,
        train=(_as_sentences(body[:low]), _as_sentences(body[high:])),
        held_out=_as_sentences(body[low:high]),
    )


def _as_sentences(body: list[str]) -> tuple[Sentence, ...]:
    return tuple(
        Sentence(text, opens_paragraph=index == 0)
        for paragraph in body
        for index, text in enumerate(sentences(paragraph))
    )
