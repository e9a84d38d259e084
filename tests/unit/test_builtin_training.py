"""How the built-in model's training data is read and packed."""

import struct
import zlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_ray.builtin.training.corpus import (
    CorpusError,
    Sentence,
    join,
    paragraphs,
    read_string_vectors,
    sentences,
)
from mell_ray.builtin.training.documents import IGNORED, Document
from mell_ray.builtin.training.packing import batches

PAD = 0


def record(lines: list[str], item_type: int = 16) -> bytes:
    """One record of an R lazy-load database, as R 4 writes it."""
    serialized = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    serialized += struct.pack(">ii", item_type, len(lines))
    for line in lines:
        text = line.encode()
        serialized += struct.pack(">ii", 0x40009, len(text)) + text
    return struct.pack(">I", len(serialized)) + zlib.compress(serialized)


@given(st.lists(st.lists(st.text(max_size=20), max_size=5), max_size=4))
def test_string_vectors_are_read_back(vectors: list[list[str]]) -> None:
    assert list(read_string_vectors(b"".join(map(record, vectors)))) == vectors


def test_other_r_objects_are_refused() -> None:
    with pytest.raises(CorpusError, match="R type 13"):
        list(read_string_vectors(record(["a"], item_type=13)))


def test_printed_lines_become_paragraphs_without_headings() -> None:
    lines = ["CHAPTER I", "", "She was _very_", "happy.", "", "VOLUME II", "", '"Indeed!" he said.']
    assert paragraphs(lines) == ["She was very happy.", '"Indeed!" he said.']


def test_sentences_keep_titles_and_quotes_whole() -> None:
    text = 'Mr. Weston came. "Is he well?" asked Emma. She had no doubt.'
    expected = ["Mr. Weston came.", '"Is he well?" asked Emma.', "She had no doubt."]
    assert sentences(text) == expected
    assert join([Sentence(s, opens_paragraph=not i) for i, s in enumerate(expected)]) == text


@given(st.lists(st.integers(2, 4096), max_size=30), st.integers(0, 3))
def test_packing_keeps_every_document_whole(lengths: list[int], seed: int) -> None:
    documents = [
        Document(ids=[index + 1] * length, labels=[IGNORED] + [index + 1] * (length - 1))
        for index, length in enumerate(lengths)
    ]
    found: dict[int, int] = {}
    for batch in batches(documents, 2048, PAD, Random(seed)):
        for ids, positions, labels in zip(
            batch.input_ids.tolist(),
            batch.position_ids.tolist(),
            batch.labels.tolist(),
            strict=True,
        ):
            starts = [i for i, position in enumerate(positions) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                (token,) = set(ids[start:end])
                assert positions[start:end] == list(range(end - start))
                if token == PAD:
                    assert set(labels[start:end]) == {IGNORED}
                    continue
                assert token not in found
                found[token] = end - start
                assert labels[start:end] == [token] * (end - start - 1) + [IGNORED]
    assert found == {index + 1: length for index, length in enumerate(lengths)}
