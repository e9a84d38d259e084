"""Text that comes out piece by piece is the text of all tokens, never taken back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_ray.openai.detok import Detokenizer
from mell_ray.openai.text import TextStream
from mell_ray.openai.tokenizer import vocabulary_of

unicode_text = st.text(st.characters(codec="utf-8"), max_size=60)
awkward_text = st.text("aé€日😀👍🏽 \n\u200d▁\u2028", max_size=60)


def pieces(tokenizer, ids):
    stream = TextStream(tokenizer, [])
    return [*(stream.push([token]).text for token in ids), stream.finish().text]


@settings(max_examples=150, deadline=None)
@given(text=unicode_text | awkward_text)
def test_text_is_exact_for_any_unicode(any_tokenizer, text):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    expected = any_tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    assert "".join(pieces(any_tokenizer, ids)) == expected


@settings(max_examples=80, deadline=None)
@given(text=unicode_text | awkward_text, cuts=st.sets(st.integers(0, 100), max_size=8))
def test_how_tokens_are_cut_into_pushes_does_not_matter(any_tokenizer, text, cuts):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    stream, out = TextStream(any_tokenizer, []), ""
    for start, end in itertools.pairwise([0, *sorted(cuts), len(ids) + 100]):
        out += stream.push(ids[start:end]).text

    assert out + stream.finish().text == "".join(pieces(any_tokenizer, ids))
    assert stream.num_tokens == len(ids)


@settings(max_examples=100, deadline=None)
@given(text=unicode_text | awkward_text)
def test_complete_characters_are_not_withheld(byte_level, text):
    ids = byte_level.encode(text, add_special_tokens=False)
    stream, sent = TextStream(byte_level, []), ""
    for i, token in enumerate(ids):
        sent += stream.push([token]).text
        so_far = byte_level.backend_tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        assert sent == so_far.rstrip("\ufffd")


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(1, 323), max_size=120))
def test_byte_level_is_exact_for_any_tokens_even_broken_utf8(byte_level, ids):
    expected = byte_level.backend_tokenizer.decode(ids, skip_special_tokens=True)

    assert "".join(pieces(byte_level, ids)) == expected


broken_bytes = st.lists(st.sampled_from([0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98]), max_size=150)


def byte_tokens(tokenizer, raw: bytes) -> list[int]:
    of_byte = {vocabulary_of(tokenizer).token(token)[1]: token for token in range(len(tokenizer))}
    return [of_byte[bytes([byte])] for byte in raw]


@pytest.mark.parametrize("length", range(20, 75))
def test_a_character_after_a_long_run_of_broken_bytes_is_whole(byte_level, length):
    raw = b"\x80" * length + "😀€😀".encode()

    assert "".join(pieces(byte_level, byte_tokens(byte_level, raw))) == raw.decode(
        "utf-8", "replace"
    )


@settings(max_examples=100, deadline=None)
@given(raw=broken_bytes)
def test_long_runs_of_broken_bytes_stay_exact_and_bounded(byte_level, raw):
    ids = byte_tokens(byte_level, bytes(raw))
    detokenizer = Detokenizer(vocabulary_of(byte_level), frozenset())
    out = ""
    for token in ids:
        out += detokenizer.push(token)
        assert len(detokenizer._window) <= 33
    assert out + detokenizer.finish() == bytes(raw).decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 329), max_size=80))
def test_sentencepiece_never_loses_valid_text(sentencepiece, ids):
    expected = sentencepiece.backend_tokenizer.decode(ids, skip_special_tokens=True)
    got = "".join(pieces(sentencepiece, ids))

    if "\ufffd" not in expected:
        assert got == expected


def test_a_character_of_four_bytes_comes_at_its_last_token(sentencepiece):
    ids = sentencepiece.encode("a😀😀b", add_special_tokens=False)

    assert [p for p in pieces(sentencepiece, ids) if p] == ["a", "😀", "😀", "b"]


def test_a_cut_off_character_is_flushed_as_the_decoder_writes_it(byte_level):
    ids = byte_level.encode("a🦀")[:-1]

    assert "".join(pieces(byte_level, ids)) == "a\ufffd"


def test_special_tokens_stay_out_of_the_text_and_keep_the_blank_after_them(sentencepiece):
    ids = sentencepiece.encode("hello world", add_special_tokens=False)
    eos = sentencepiece.eos_token_id
    words = [token for token in ids for token in (token, eos)]

    assert "".join(pieces(sentencepiece, words)) == "hello world"


def test_ids_without_a_token_do_not_swallow_the_blank_after_them(sentencepiece):
    ids = sentencepiece.encode("hello world", add_special_tokens=False)
    padded = [token for real in ids for token in (real, 10**6)]

    assert "".join(pieces(sentencepiece, padded)) == "hello world"


def test_special_tokens_are_shown_on_request(byte_level):
    stream = TextStream(byte_level, [], skip_special_tokens=False)

    assert stream.push([byte_level.eos_token_id]).text == "</s>"


def test_hidden_tokens_are_counted_but_not_shown(byte_level):
    ids = byte_level.encode("a\n")
    stream = TextStream(byte_level, [], hidden_token_ids=[ids[-1]])

    assert stream.push(ids).text == "a"
    assert stream.num_tokens == len(ids)


def test_ids_without_a_token_cost_no_growing_window(byte_level):
    detokenizer = Detokenizer(vocabulary_of(byte_level), frozenset())
    assert [detokenizer.push(10**6) for _ in range(200)] == [""] * 200
    assert len(detokenizer._window) <= 33
    [word] = byte_level.encode("hello")
    assert detokenizer.push(word) == "hello"


class PlainTokenizer:
    """A tokenizer that is not backed by the tokenizers library."""

    all_special_ids = (0,)

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_tokenizers_without_a_fast_backend_work():
    stream = TextStream(PlainTokenizer(), ["c"])

    assert stream.push([97, 0, 98]).text == "ab"
    assert stream.push([99]).stopped


@pytest.mark.parametrize(
    ("text", "raw"),
    [("a", b"a"), (" ", b" "), ("€", "€".encode())],
)
def test_one_token_has_its_text_and_bytes(sentencepiece, text, raw):
    ids = sentencepiece.encode(text, add_special_tokens=False)
    joined = b"".join(vocabulary_of(sentencepiece).token(token)[1] for token in ids)

    assert joined == b" " + raw  # SentencePiece writes a blank before the text


def test_a_part_of_a_character_is_shown_as_escaped_bytes(byte_level):
    [first, *_] = byte_level.encode("🦀")

    assert vocabulary_of(byte_level).token(first) == ("\\xf0\\x9f", b"\xf0\x9f")


def test_an_id_without_a_token_has_no_text(byte_level):
    assert vocabulary_of(byte_level).token(10**6) == ("", b"")
