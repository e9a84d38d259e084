"""From the engine's tokens to the text and log-probabilities a client sees, one choice at a time.

Text is derived from tokens where the client's connection ends, outside the engine, so that a
request that migrates carries no text state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mell_ray.engine.types import TokenLogprobs
from mell_ray.openai.detok import Detokenizer
from mell_ray.openai.stops import StopMatcher
from mell_ray.openai.tokenizer import Tokenizer, vocabulary_of


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as logprobs show it: on its own, with the bytes it stands for."""

    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """The log-probabilities of one output token."""

    token: TokenText
    top: tuple[TokenText, ...]  # best first
    text_offset: int  # characters of the choice's text before the token


@dataclass(slots=True)
class TextPiece:
    """What one push released. Falsy if there is nothing to send to the client."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # tokens taken by this push, for usage
    logprobs: list[LogprobEntry] = field(default_factory=list)  # of tokens whose text is out
    stopped: bool = False  # a stop string is complete: the choice is over

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs)


class TextStream:
    """Tokens in, text out, for one choice.

    Releases text as soon as it cannot change any more and cannot be part of a stop string. The
    stop string itself and what follows it never come out. ``num_tokens`` counts the tokens up to
    and including the one that completed the stop string; later ones are ignored.

    :param stop: stop strings, looked for in the text only after ``min_tokens`` tokens.
    :param skip_special_tokens: leave special tokens out of the text and of the logprobs.
    :param hidden_token_ids: further tokens to leave out (``stop_token_ids`` of the request).
    :param shown_token_ids: special tokens that are text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        hidden_token_ids: Collection[int] = (),
        shown_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        special = self._vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        special -= shown_token_ids
        self._hidden = special.union(hidden_token_ids) if hidden_token_ids else special
        self._detokenizer = Detokenizer(self._vocabulary, self._hidden)
        self._matcher = StopMatcher(stop) if stop else None
        self._min_tokens = min_tokens
        self._held = ""  # final text that may be the beginning of a stop string
        self._decoded = 0  # characters of final text so far: released and held
        self._released = 0
        self._entries: deque[LogprobEntry] = deque()  # of tokens whose text is not out yet
        self.num_tokens = 0
        self.stopped = False

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> TextPiece:
        """Take the next tokens of the choice. After a stop string this changes nothing."""
        if self.stopped:
            return TextPiece(stopped=True)
        texts: list[str] = []
        for i, token in enumerate(token_ids):
            texts.append(self._push_one(token, logprobs[i] if logprobs else None))
            if self.stopped:
                break
        return self._piece("".join(texts), list(token_ids[: len(texts)]))

    def finish(self) -> TextPiece:
        """The choice is over: release all that was held back."""
        if self.stopped:
            return TextPiece(stopped=True)
        text = self._scan(self._detokenizer.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return self._piece(text, [], last=True)

    def _push_one(self, token: int, logprobs: TokenLogprobs | None) -> str:
        self.num_tokens += 1
        if logprobs is not None and token not in self._hidden:
            self._entries.append(self._entry(token, logprobs))
        return self._scan(self._detokenizer.push(token))

    def _scan(self, text: str) -> str:
        """Look for stop strings in new final text; return what may be released."""
        self._decoded += len(text)
        if self._matcher is None or self.num_tokens <= self._min_tokens:
            return text
        text, found = self._held + text, self._matcher.feed(text)
        if found is not None:
            read, length = found
            self.stopped = True
            text, self._held = text[: len(self._held) + read - length], ""
            return text
        cut = len(text) - self._matcher.pending
        self._held = text[cut:]
        return text[:cut]

    def _piece(self, text: str, token_ids: list[int], *, last: bool = False) -> TextPiece:
        self._released += len(text)
        entries: list[LogprobEntry] = []
        flush = last and not self.stopped
        while self._entries and (flush or self._entries[0].text_offset < self._released):
            entries.append(self._entries.popleft())
        return TextPiece(text, token_ids, entries, self.stopped)

    def _entry(self, token: int, logprobs: TokenLogprobs) -> LogprobEntry:
        return LogprobEntry(
            self._token_text(token, logprobs.logprob),
            tuple(self._token_text(other, value) for other, value in logprobs.top),
            self._decoded,
        )

    def _token_text(self, token: int, logprob: float) -> TokenText:
        text, raw = self._vocabulary.token(token)
        return TokenText(text, raw, logprob)
