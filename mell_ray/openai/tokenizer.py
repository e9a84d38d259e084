"""What this package needs of a Hugging Face tokenizer, and what single tokens look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of ``transformers.PreTrainedTokenizerBase`` that is used here."""

    chat_template: Any
    bos_token_id: int | None
    all_special_ids: list[int]

    def __hash__(self) -> int: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str: ...


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in kept}
    others = [byte for byte in range(256) if byte not in set(kept)]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


class Vocabulary:
    """Read-only view of a tokenizer: decoding without clean-up, and the bytes of one token.

    Made once per tokenizer (``vocabulary_of``), shared by all its streams.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds, added = _decoder_kinds(backend), _added_tokens(backend)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._added = {token_id: token.content for token_id, token in added.items()}
        special = [token_id for token_id, token in added.items() if token.special]
        self.special_ids = frozenset([*special, *tokenizer.all_special_ids])
        self._cache: dict[int, tuple[str, bytes]] = {}
        self.decode: Callable[[list[int]], str] = _decoder(tokenizer, backend)
        self._alone: dict[int, str] = {}

    def alone(self, token_id: int) -> str:
        """``decode([token_id])``, remembered."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode([token_id])
        return text

    def token(self, token_id: int) -> tuple[str, bytes]:
        """Text and bytes of one token on its own.

        A token may hold only a part of a character; bytes that are no text are written ``\\xe2``.
        """
        entry = self._cache.get(token_id)
        if entry is None:
            raw = self._bytes(token_id)
            entry = self._cache[token_id] = (raw.decode("utf-8", "backslashreplace"), raw)
        return entry

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # a row of the embedding that stands for no token
            return b""
        if self._byte_level and all(char in _byte_of_char() for char in piece):
            return bytes(_byte_of_char()[char] for char in piece)
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if "▁" in piece:  # SentencePiece's blank; decode() would drop a leading one
            return piece.replace("▁", " ").encode()
        return self.decode([token_id]).encode()


@lru_cache(maxsize=32)  # more tokenizers than one application serves
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def _decoder_kinds(backend: Any) -> set[str]:
    """Types of the decoders a ``tokenizers.Tokenizer`` chains; empty for any other tokenizer."""
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {state["type"], *(part["type"] for part in state.get("decoders", ()))}


def _added_tokens(backend: Any) -> dict[int, Any]:
    return backend.get_added_tokens_decoder() if backend is not None else {}


def _decoder(tokenizer: Tokenizer, backend: Any) -> Callable[[list[int]], str]:
    """Ids to text, special tokens included.

    The backend is called directly: it costs a quarter of ``tokenizer.decode``, and it does not
    "clean up" spaces before punctuation, which would change text that was already sent.
    """
    if backend is None:
        return lambda ids: tokenizer.decode(ids)
    decode = backend.decode
    return lambda ids: decode(ids, skip_special_tokens=False)
