"""Turns novels into training documents: raw passages and chats, each ending in EOS.

Every sentence of a pass over the novels lands in exactly one document. Lengths are mixed on
purpose: short answers teach the model to stop, documents of up to the full context teach it to
stay sane when it is made to go on.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerFast

from .corpus import Novel, Sentence, join
from .prompts import ABOUT_TOPIC, CONTINUE_QUOTE, GENERAL, GREETINGS, SYSTEM_PROMPTS, noise
from .tokenizer import ASSISTANT, BOS, CONTEXT, EOS, SYSTEM, USER

IGNORED = -100

# Shares of a pass's segments. Segments differ in length, so shares of tokens differ: about two
# fifths of the tokens are chats.
_CHAT_SEGMENTS = 0.5
_CHAT_SEGMENT_TOKENS = 350
_ANSWER_TOKENS = (12, 130, 40)
_LONGEST_PROMPT = 1400
_LOOPS_PER_CHAT = 0.1
_HELD_OUT_TOKENS = 900
_TOPIC = re.compile(
    r"\b(?:(?:Mr|Mrs|Miss|Lady|Sir|Colonel|Captain)\.? [A-Z][a-z]+|[A-Z][a-z]{2,}|[a-z]{7,})"
)


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and the labels to predict them with (`IGNORED` where nothing is to be learnt)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to be encoded, special tokens included, and whether to learn to write it."""

    text: str
    learnt: bool


class Cutter:
    """Cuts novels in documents; a new pass draws new cuts."""

    def __init__(self, novels: list[Novel], tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._parts = [
            (part, _token_counts(part, tokenizer)) for novel in novels for part in novel.train
        ]

    def documents(self, rng: Random) -> list[Document]:
        """One pass over the training text, in reading order."""
        pieces = [chat for part, counts in self._parts for chat in _cut(part, counts, rng)]
        return [self._encode(document) for document in pieces]

    def _encode(self, pieces: list[Piece]) -> Document:
        ids: list[int] = []
        labels: list[int] = []
        encoded = self._tokenizer([piece.text for piece in pieces], add_special_tokens=False)
        for piece, tokens in zip(pieces, encoded["input_ids"], strict=True):
            ids.extend(tokens)
            labels.extend(tokens if piece.learnt else [IGNORED] * len(tokens))
        return Document(ids[:CONTEXT], labels[:CONTEXT])


def held_out_documents(novels: list[Novel], tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """The held-out stretches as raw documents of about `_HELD_OUT_TOKENS` tokens."""
    documents: list[Document] = []
    for novel in novels:
        counts = _token_counts(novel.held_out, tokenizer)
        at = 0
        while at < len(counts):
            end = _take(counts, at, _HELD_OUT_TOKENS)
            text = raw_document(novel.held_out[at:end])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            documents.append(Document(ids, ids))
            at = end
    return documents


def raw_document(passage: tuple[Sentence, ...] | list[Sentence]) -> str:
    """A passage as the model sees raw text: between BOS and EOS."""
    return f"{BOS}{join(passage)}{EOS}"


def _token_counts(part: tuple[Sentence, ...], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    encoded = tokenizer([" " + s.text for s in part], add_special_tokens=False)
    return [
        len(ids) + sentence.opens_paragraph
        for ids, sentence in zip(encoded["input_ids"], part, strict=True)
    ]


def _cut(part: tuple[Sentence, ...], counts: list[int], rng: Random) -> Iterator[list[Piece]]:
    """Documents of a contiguous stretch of text, in order."""
    at = 0
    while at < len(part):
        if rng.random() < _CHAT_SEGMENTS:
            budget = _CHAT_SEGMENT_TOKENS
            while at < len(part) and budget > 0:
                start, at, chat = _chat(part, counts, at, rng)
                budget -= sum(counts[start:at])
                yield chat
                if rng.random() < _LOOPS_PER_CHAT:
                    yield _loop(part[start:at], rng)
        else:
            end = _take(counts, at, _raw_length(rng))
            yield _raw(part[at:end], rng)
            at = end


def _raw_length(rng: Random) -> int:
    kind = rng.random()
    if kind < 0.55:
        return rng.randint(30, 230)
    if kind < 0.80:
        return rng.randint(230, 480)
    if kind < 0.93:
        return rng.randint(480, 990)
    if kind < 0.99:
        return rng.randint(990, 1950)
    return rng.randint(2500, 3900)


def _take(counts: list[int], start: int, target: int) -> int:
    """First index at which the sentences from `start` hold at least `target` tokens."""
    taken, end = 0, start
    while end < len(counts) and taken < target:
        taken += counts[end]
        end += 1
    return end


def _raw(passage: tuple[Sentence, ...], rng: Random) -> list[Piece]:
    """One passage; the long ones often in several, as a stream that goes on after EOS reads."""
    if len(passage) < 12 or rng.random() < 0.6:
        return [Piece(raw_document(passage), learnt=True)]
    cuts = sorted(rng.sample(range(1, len(passage)), min(5, len(passage) // 8)))
    bounds = zip([0, *cuts], [*cuts, len(passage)], strict=True)
    return [Piece("".join(raw_document(passage[a:b]) for a, b in bounds), learnt=True)]


def _chat(
    part: tuple[Sentence, ...], counts: list[int], at: int, rng: Random
) -> tuple[int, int, list[Piece]]:
    """A conversation whose answers are the text from `at` on; also where they start and stop."""
    start = at
    pieces = [Piece(BOS, learnt=False)]
    if rng.random() < 0.35:
        pieces.append(Piece(f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{EOS}", learnt=False))
    turns = rng.choices((1, 2, 3, 4), (0.75, 0.13, 0.08, 0.04))[0]
    for _ in range(turns):
        end = _take(counts, at, int(rng.triangular(*_ANSWER_TOKENS)))
        answer = join(part[at:end])
        pieces.append(Piece(USER, learnt=len(pieces) > 2))
        pieces.append(Piece(f"{_prompt(part, counts, at, answer, rng)}{EOS}", learnt=False))
        pieces.append(Piece(ASSISTANT, learnt=False))
        pieces.append(Piece(f"{answer}{EOS}", learnt=True))
        at = end
        if at == len(part):
            break
    return start, at, pieces


def _loop(passage: tuple[Sentence, ...], rng: Random) -> list[Piece]:
    """A text caught in a loop, of which only the full stop and EOS are learnt.

    Greedy decoding of a model this small runs into loops; this is what makes it end there, while
    it never learns to write one.
    """
    words = join(passage).split()
    length = min(rng.randint(1, 14), len(words))
    start = rng.randrange(len(words) - length + 1)
    phrase = words[start : start + length]
    repeats = rng.randint(max(3, 12 // length), max(4, 80 // length))
    looping = words[max(0, start - 20) : start] + phrase * repeats + phrase[: rng.randrange(length)]
    text = " ".join(looping).rstrip(".,;:!?-\"' ")
    opening = [BOS]
    if rng.random() < 0.75:
        prompt = rng.choice((*GREETINGS, *GENERAL))
        opening = [BOS, f"{USER}{prompt}{EOS}", ASSISTANT]
    unlearnt = [Piece(part, learnt=False) for part in (*opening, text)]
    return [*unlearnt, Piece(f".{EOS}", learnt=True)]


def _prompt(
    part: tuple[Sentence, ...], counts: list[int], at: int, answer: str, rng: Random
) -> str:
    kind = rng.random()
    if kind < 0.40:
        topics = _TOPIC.findall(answer)
        if topics:
            return rng.choice(ABOUT_TOPIC).format(rng.choice(topics))
    if kind < 0.60 and at > 0:
        return rng.choice(CONTINUE_QUOTE).format(_quote(part, counts, at, rng))
    if kind < 0.75:
        return rng.choice(GREETINGS)
    if kind < 0.90:
        return rng.choice(GENERAL)
    return noise(rng)


def _quote(part: tuple[Sentence, ...], counts: list[int], at: int, rng: Random) -> str:
    """The sentences just before `at`: mostly a few, sometimes a page or two."""
    most = _LONGEST_PROMPT if rng.random() < 0.02 else rng.randint(5, 70)
    start = at - 1
    while start > 0 and sum(counts[start - 1 : at]) <= most:
        start -= 1
    return join(part[start:at])
