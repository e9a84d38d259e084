"""Gumbel-max noise that depends on nothing but (seed, position, token id).

A token drawn at a position is then the same on whichever replica, in whichever batch it is drawn,
and it changes less often under rounding noise than with one uniform number and an inverse CDF.
Pure 32-bit integer hashing, so that every implementation gives the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
# No noise is larger: -log(-log(u)) at the largest of the 2**23 uniforms, rounded up.
GUMBEL_MAX = 16.64
# Gathering what can win pays only if it is less than this part of the vocabulary.
_SPARSE_BELOW = 16
_DENSE_ELEMENTS = 1 << 15


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
    u = ((x >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def row_argmax(scores: torch.Tensor) -> torch.Tensor:
    """``[R]`` int64, the lowest id of equals; a NaN is above everything, as for torch's own, which
    takes ten times as long as numpy's on a CPU."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    if scores.dtype in _LARGEST_BITS:
        return _row_argmax_by_bits(scores)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


# The bits of minus infinity, as an unsigned number: above it there are only NaNs.
_LARGEST_BITS = {torch.bfloat16: 0xFF80, torch.float16: 0xFC00}


def _row_argmax_by_bits(scores: torch.Tensor) -> torch.Tensor:
    """Of 16-bit floats, as integers: their order is the same from zero on."""
    bits = scores.contiguous().view(torch.int16).numpy()
    ids = bits.argmax(axis=-1)
    best = bits[np.arange(len(bits)), ids]
    if (best <= 0).any() or (bits.view(np.uint16).max(initial=0) > _LARGEST_BITS[scores.dtype]):
        return row_argmax(scores.float())
    return torch.from_numpy(ids)


def gumbel_argmax(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``argmax(scores + noise)`` of each row over the whole vocabulary, exactly.

    Noise is drawn only where it can win, if that is a small part: the likeliest token's noisy score
    is a lower bound of the winner's, and no noise exceeds ``GUMBEL_MAX``.

    Args:
        scores: ``[R, V]`` float32, logits over temperature; ``-inf`` is never drawn.
        keys: ``[R, 2]`` int32.

    Returns:
        ``[R]`` int64 token ids, the lowest of equals.
    """
    best, best_ids = scores.max(dim=-1)
    bound = best + gumbel(keys, best_ids.int()) - GUMBEL_MAX
    can_win = scores >= bound[:, None]
    if int(can_win.sum()) * _SPARSE_BELOW > scores.numel():
        return _dense_argmax(scores, keys)
    rows, ids = can_win.nonzero(as_tuple=True)
    noisy = scores[rows, ids] + gumbel(keys[rows], ids.int())
    winner = torch.full_like(best, -torch.inf).scatter_reduce_(0, rows, noisy, "amax")
    wins = noisy == winner[rows]
    result = torch.full_like(best_ids, scores.shape[1])
    return result.scatter_reduce_(0, rows[wins], ids[wins], "amin")


def _dense_argmax(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A few rows at a time, so that the intermediate results stay in a CPU's cache."""
    rows, vocab = scores.shape
    token_ids = torch.arange(vocab, dtype=torch.int32, device=scores.device)
    count = max(1, _DENSE_ELEMENTS // vocab) if scores.device.type == "cpu" else rows
    parts = [
        row_argmax(gumbel(keys[i : i + count, None], token_ids).add_(scores[i : i + count]))
        for i in range(0, rows, count)
    ]
    return torch.cat(parts)


def ranked_topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` best of each row by (score descending, id ascending): values and ids.

    Score and id are packed into one integer whose order is just that, so that ties are settled the
    same way for every ``count`` and on every device.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: the two zeros are one score
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    token_ids = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device)
    packed = (~rising).long().bitwise_left_shift_(32).bitwise_or_(token_ids)
    ids = _smallest(packed, count) & 0xFFFFFFFF
    return scores.gather(-1, ids), ids


def _smallest(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` smallest of each row in ascending order. numpy's sort of integers is several
    times faster than torch's on a CPU."""
    if packed.device.type != "cpu":
        return packed.topk(count, dim=-1, largest=False, sorted=True).values
    array = packed.numpy()
    if count < array.shape[1]:
        array = np.partition(array, count - 1, axis=-1)[:, :count]
    return torch.from_numpy(np.sort(array, axis=-1))
