"""Incremental detokenisation: token ids in, text that will not change any more out."""

from __future__ import annotations

from mell_ray.openai.tokenizer import Vocabulary

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_MAX_WINDOW = 32  # tokens decoded again at most, however long no character completes
_MAX_PARTIAL = 3  # replacement characters at the end that one more token may turn into text
_OVERLAP = 8  # tokens kept when the window is cut; a character has at most 4 bytes


class Detokenizer:
    """Decodes a window that slides over the tokens.

    What a token decodes to depends on its neighbours (a character split over tokens, a leading
    blank), so the last tokens already sent are decoded again with the new ones, and only what
    comes after is new. The concatenation of all text equals the decoding of all tokens, whenever
    that is valid text; with a byte-level decoder, for any tokens at all.
    """

    __slots__ = ("_alone", "_decode", "_num_new", "_sent", "_skipped", "_window")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._decode = vocabulary.decode
        self._alone = vocabulary.alone
        self._skipped = skipped  # ids that never become text
        self._window: list[int] = []
        self._num_new = 0  # last tokens of the window, since a character was last complete
        self._sent = 0  # characters of the decoded window that were returned

    def push(self, token: int) -> str:
        """New final text; trailing bytes that may still become a character are held back."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        self._num_new += 1
        text = self._decode(self._window)
        final = len(text)
        if text.endswith(REPLACEMENT):
            final = len(text.rstrip(REPLACEMENT))
            if len(self._window) > _MAX_WINDOW:
                final = max(final, len(text) - _MAX_PARTIAL)
        new = text[self._sent : final]
        self._sent = max(self._sent, final)
        self._slide(len(text) - self._sent)
        return new

    def finish(self) -> str:
        """The text held back, as the decoder writes it when nothing follows."""
        text = self._decode(self._window)[self._sent :] if self._window else ""
        self._window, self._num_new, self._sent = [], 0, 0
        return text

    def _slide(self, held: int) -> None:
        """Drop the tokens that the next ones cannot depend on: all up to a complete character,
        except those since the one before it."""
        too_long = len(self._window) > _MAX_WINDOW
        if held and not too_long:
            return
        keep = min(self._num_new, _OVERLAP) if too_long else self._num_new
        tail = self._window[-keep:]
        decoded = self._alone(tail[0]) if len(tail) == 1 else self._decode(tail)
        # A decoder strips the blank at the beginning of the text, so the window must not begin with
        # an id that is no text (padding of the vocabulary).
        if decoded or too_long:
            self._window, self._sent = tail, max(len(decoded) - held, 0)
            self._num_new = 0
