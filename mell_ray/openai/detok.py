"""Incremental detokenisation: token ids in, text that will not change any more out."""

from __future__ import annotations

from collections.abc import Sequence

from mell_ray.openai.tokenizer import Vocabulary

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_MAX_WINDOW = 32  # tokens decoded again at most, however long no character completes
_OVERLAP = 8  # tokens kept when the window is cut; a character has at most 4 bytes


class Detokenizer:
    """Decodes a window that slides over the tokens.

    What a token decodes to depends on its neighbours (a character split over tokens, a leading
    blank), so the last tokens already sent are decoded again with the new ones, and only what
    comes after is new. The concatenation of all text equals the decoding of all tokens, whenever
    that is valid text; with a byte-level decoder, for any tokens at all.
    """

    __slots__ = ("_decode", "_sent", "_skipped", "_window")

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._decode = vocabulary.decode
        self._skipped = skipped  # ids that never become text
        self._window: list[int] = []
        self._sent = 0  # characters of the decoded window that were returned

    def push(self, token_ids: Sequence[int]) -> str:
        """New final text; trailing bytes that may still become a character are held back."""
        fresh = [token for token in token_ids if token not in self._skipped]
        if not fresh:
            return ""
        self._window += fresh
        text = self._decode(self._window)
        final = len(text)
        if text.endswith(REPLACEMENT):
            final = len(text.rstrip(REPLACEMENT))
            if len(self._window) > _MAX_WINDOW:
                final = max(final, len(text) - 3)
        new = text[self._sent : final]
        self._sent = max(self._sent, final)
        self._slide(text, len(fresh), final)
        return new

    def finish(self) -> str:
        """The text held back, as the decoder writes it when nothing follows."""
        text = self._decode(self._window)[self._sent :] if self._window else ""
        self._window, self._sent = [], 0
        return text

    def _slide(self, text: str, num_new: int, final: int) -> None:
        """Drop the tokens of the window that the next ones cannot depend on."""
        held = len(text) - final
        if held == 0:
            keep = num_new
        elif len(self._window) > _MAX_WINDOW:
            keep = _OVERLAP
        else:
            return
        if keep >= len(self._window):
            return
        tail = self._window[-keep:]
        decoded = self._decode(tail)
        if decoded:  # the window has to begin with text, or a decoder that strips would strip more
            self._window = tail
            self._sent = len(decoded) - held
