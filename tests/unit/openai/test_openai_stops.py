"""Stop strings against an oracle that reads the whole text character by character."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_ray.engine.types import TokenLogprobs
from mell_ray.openai.stops import StopMatcher
from mell_ray.openai.text import TextStream


def oracle(text: str, stops: list[str]) -> tuple[str, int | None]:
    """Text before the stop string that is complete first, and where that one ends."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], end
    return text, None


def longest_open_stop(text: str, stops: list[str]) -> int:
    lengths = [k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
    return max(lengths, default=0)


def test_matcher_is_exact_on_all_short_texts_char_by_char():
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("ab", repeat=n)]
    sets = [[a, b] for a, b in itertools.combinations(words, 2)]
    texts = ["".join(t) for t in itertools.product("ab", repeat=6)]
    for stops, text in itertools.product(sets, texts):
        matcher = StopMatcher(stops)
        for i, char in enumerate(text):
            found = matcher.feed(char)
            if found:
                break
            assert matcher.pending == longest_open_stop(text[: i + 1], stops)
        before, end = oracle(text, stops)
        assert (found is not None) == (end is not None)
        if found:
            assert (i + 1, i + 1 - found[1]) == (end, len(before))


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abc€😀 ", max_size=30),
    stops=st.lists(st.text("abc€😀 ", min_size=1, max_size=5), max_size=4),
    size=st.integers(1, 5),
)
def test_stream_equals_oracle_however_tokens_arrive(any_tokenizer, text, stops, size):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    text = any_tokenizer.backend_tokenizer.decode(ids)
    before, end = oracle(text, stops)
    stream, out, stopped = TextStream(any_tokenizer, stops), "", False
    for at in range(0, len(ids), size):
        piece = stream.push(ids[at : at + size])
        out += piece.text
        assert before.startswith(out)
        stopped = piece.stopped
    final = stream.finish()

    assert out + final.text == before
    assert (stopped or final.stopped) == (end is not None)


@settings(max_examples=150, deadline=None)
@given(text=st.text("abc", max_size=30), stop=st.text("abc", min_size=1, max_size=4))
def test_usage_counts_up_to_the_token_that_completes_the_stop(byte_level, text, stop):
    ids = byte_level.encode(text)
    _, end = oracle(text, [stop])
    stream = TextStream(byte_level, [stop])
    piece = stream.push(ids)

    covered = [len(byte_level.decode(ids[: i + 1])) for i in range(len(ids))]
    expected = len(ids) if end is None else 1 + sum(length < end for length in covered)
    assert stream.num_tokens == len(piece.token_ids) == expected


def test_only_what_may_begin_a_stop_is_held_back(byte_level):
    stream = TextStream(byte_level, ["xyz!"])
    out = [stream.push(byte_level.encode(char)).text for char in "axyaxyz"]

    assert out == ["a", "", "", "xya", "", "", ""]
    assert stream.finish().text == "xyz"


def test_nothing_comes_after_the_stop(byte_level):
    stream = TextStream(byte_level, ["Q"])
    piece = stream.push(byte_level.encode("aQb"))
    assert (piece.text, piece.stopped) == ("a", True)

    later = stream.push(byte_level.encode("c"))
    assert (later.text, later.token_ids, later.stopped) == ("", [], True)
    assert stream.finish().text == ""


def test_stop_split_over_tokens_and_inside_a_token(byte_level):
    [hello] = byte_level.encode("hello")
    for stop, text in [("lo", "hel"), ("oQ", "hell"), ("hello", ""), ("h", "")]:
        stream = TextStream(byte_level, [stop])
        assert stream.push([hello, *byte_level.encode("Q")]).text == text
        assert stream.stopped


def test_the_stop_that_is_complete_first_wins(byte_level):
    stream = TextStream(byte_level, ["abcd", "bc"])

    assert stream.push(byte_level.encode("abcd")).text == "a"


def test_stop_is_found_in_text_flushed_at_the_end(byte_level):
    stream = TextStream(byte_level, ["\ufffd"])
    assert not stream.push(byte_level.encode("a🦀")[:-1]).stopped
    last = stream.finish()

    assert (last.text, last.stopped) == ("", True)


def test_stops_count_only_after_min_tokens(byte_level):
    ids = [token for char in "aQbQc" for token in byte_level.encode(char)]
    stream = TextStream(byte_level, ["Q"], min_tokens=2)

    assert stream.push(ids).text == "aQb"
    assert stream.num_tokens == 4


def fake_logprobs(ids):
    return [TokenLogprobs(-i - 1.0, ((token, -i - 1.0),)) for i, token in enumerate(ids)]


def by_token(stream, ids):
    pushed = [stream.push([t], [lp]) for t, lp in zip(ids, fake_logprobs(ids), strict=True)]
    return [*pushed, stream.finish()]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab€😀 é", max_size=20),
    stops=st.lists(st.text("ab€😀 é", min_size=1, max_size=3), max_size=2),
)
def test_logprobs_go_with_their_text(byte_level, text, stops):
    ids = byte_level.encode(text)
    raw, sent = b"", ""
    entries = []
    for piece in by_token(TextStream(byte_level, stops), ids):
        sent += piece.text
        entries += piece.logprobs
        raw = b"".join(entry.token.bytes for entry in entries)
        # No token whose text is not out, and none missing whose text is.
        assert all(entry.text_offset < len(sent) for entry in piece.logprobs)
        assert raw.startswith(sent.encode())

    before, _ = oracle(text, stops)
    assert sent == before
    assert [entry.token.logprob for entry in entries] == [-i - 1.0 for i in range(len(entries))]
    start_bytes = list(itertools.accumulate((len(e.token.bytes) for e in entries), initial=0))
    for entry, start in zip(entries, start_bytes, strict=False):
        assert len(text.encode()[:start].decode("utf-8", "ignore")) == entry.text_offset


def test_logprobs_of_trimmed_tokens_are_trimmed(byte_level):
    ids = [token for char in "abQcd" for token in byte_level.encode(char)]
    pieces = by_token(TextStream(byte_level, ["Qc"]), ids)

    assert [e.token.text for p in pieces for e in p.logprobs] == ["a", "b"]
    assert [e.text_offset for p in pieces for e in p.logprobs] == [0, 1]


def test_logprobs_wait_while_their_text_is_held_back(byte_level):
    ids = [token for char in "aQb" for token in byte_level.encode(char)]
    shown = [
        (p.text, [e.token.text for e in p.logprobs])
        for p in by_token(TextStream(byte_level, ["QQ"]), ids)
    ]

    assert shown == [("a", ["a"]), ("", []), ("Qb", ["Q", "b"]), ("", [])]


def test_logprobs_of_a_cut_off_character_come_with_the_flush(byte_level):
    ids = byte_level.encode("a🦀")[:-1]
    *_, last = by_token(TextStream(byte_level, []), ids)

    assert last.text == "\ufffd"
    assert b"".join(e.token.bytes for e in last.logprobs) == "🦀".encode()[:-1]


def test_logprobs_of_text_flushed_into_a_stop_are_trimmed(byte_level):
    ids = byte_level.encode("a🦀")[:-1]
    pieces = by_token(TextStream(byte_level, ["\ufffd"]), ids)

    assert pieces[-1].stopped
    assert [e.token.text for p in pieces for e in p.logprobs] == ["a"]


def test_special_tokens_have_no_logprobs(byte_level):
    ids = [*byte_level.encode("a"), byte_level.eos_token_id]
    pieces = by_token(TextStream(byte_level, []), ids)

    assert [e.token.text for p in pieces for e in p.logprobs] == ["a"]


@pytest.mark.parametrize("size", [1, 5])
def test_alternatives_keep_their_order(byte_level, size):
    [a, b] = byte_level.encode("Qz")
    logprobs = [TokenLogprobs(-2.0, ((b, -1.0), (a, -2.0)))] * size
    piece = TextStream(byte_level, []).push([a] * size, logprobs)

    assert [[t.text for t in e.top] for e in piece.logprobs] == [["z", "Q"]] * size
