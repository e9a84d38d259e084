"""What a prompt begins with, as the Router compares it: chained hashes of its full blocks."""

from __future__ import annotations

from collections.abc import Sequence

from mell_ray.config import LLMConfig
from mell_ray.engine.block_pool import extend_chain, root_hash

MAX_BLOCKS = 512  # longer prefixes are told apart by their replica, not by the Router


def cacheable_block_size(llm: LLMConfig) -> int:
    """Tokens per block of the model's prefix cache; 0: it has none."""
    engine = llm.engine_kwargs
    return engine.block_size if engine.enable_prefix_caching else 0


def prompt_prefix(model_id: str, token_ids: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """One hash per full block, first block first; a hash names all that is before its block."""
    if not block_size:
        return ()
    chain: list[bytes] = []
    blocks = min(len(token_ids) // block_size, MAX_BLOCKS)
    extend_chain(chain, root_hash(model_id), token_ids, block_size, blocks)
    return tuple(chain)
