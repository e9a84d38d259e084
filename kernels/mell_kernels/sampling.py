"""Gumbel-max noise that depends on nothing but (seed, position, token id).

A token drawn at a position is then the same on whichever replica, in whichever batch it is drawn,
and it changes less often under rounding noise than with one uniform number and an inverse CDF.
Pure 32-bit integer hashing, so that every implementation gives the same bits.
"""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1
# No noise is larger: -log(-log(u)) at the largest of the 2**23 uniforms, rounded up.
GUMBEL_MAX = 16.64


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """The key of all draws at one absolute position of a request: two signed 32-bit integers."""
    x = _splitmix64((seed & _MASK64) ^ _splitmix64(position))
    return _signed32(x), _signed32(x >> 32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32, in place, on int32 whose arithmetic wraps."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise.

    Args:
        keys: ``[..., 2]`` int32 from ``noise_key``.
        token_ids: int32; broadcasts against ``keys[..., 0]``.

    Returns:
        float32 of the broadcast shape, between -2.82 and ``GUMBEL_MAX``.
    """
    x = _mix(token_ids * _signed32(0x9E3779B9) + keys[..., 0])
    x = _mix(x ^ keys[..., 1])
    u = (((x >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def gumbel_argmax(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``argmax(scores + noise)`` of each row over the whole vocabulary, exactly.

    Noise is drawn only where it can win: the likeliest token's noisy score is a lower bound of the
    winner's, and no noise exceeds ``GUMBEL_MAX``.

    Args:
        scores: ``[R, V]`` float32, logits over temperature; ``-inf`` is never drawn.
        keys: ``[R, 2]`` int32.

    Returns:
        ``[R]`` int64 token ids.
    """
    best, best_ids = scores.max(dim=-1)
    bound = best + gumbel(keys, best_ids.int()) - GUMBEL_MAX
    rows, ids = (scores >= bound[:, None]).nonzero(as_tuple=True)
    noisy = scores[rows, ids] + gumbel(keys[rows], ids.int())
    winner = torch.full_like(best, -torch.inf).scatter_reduce_(0, rows, noisy, "amax")
    wins = noisy == winner[rows]
    result = torch.full_like(best_ids, scores.shape[1])
    return result.scatter_reduce_(0, rows[wins], ids[wins], "amin")


def ranked_topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk`` of each row, sorted by score and, among equal scores in the result, by id.

    Which of several tokens that equal the last score are in the result is not defined.
    """
    values, ids = scores.topk(count, dim=-1, sorted=False)
    ids, order = ids.sort(dim=-1)
    values = values.gather(-1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
