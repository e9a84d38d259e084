"""From logits to tokens in one Triton kernel: temperature, top-k, top-p, min-p, and Gumbel noise.

Nothing is sorted. What top-k and top-p keep of a row is a prefix of its tokens ordered by (score
descending, id ascending), and such a prefix is a score and how many of the tokens that have exactly
this score are kept. The score is found by bisection over the bits of a float, which compare like
integers: at most 32 passes over a row that lies in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mell_kernels.rows import SamplingRows

_TILE = 4096
# As ordered integers (see _order): minus infinity, and 0, the score of the likeliest token.
_LOWEST = tl.constexpr(-2139095041)
_HIGHEST = tl.constexpr(0)


@triton.jit
def _mix(x):
    # lowbias32 on int32 that wraps; shifts of signed integers drag the sign, so it is masked off.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _uniform(key_0, key_1, token_ids):
    """The same bits as ``sampling.gumbel`` takes its logarithms of."""
    x = _mix(token_ids * -1640531527 + key_0)
    x = _mix(x ^ key_1)
    return (((x >> 9) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _order(scores):
    """Integers that compare as the scores do."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # + 0.0: the two zeros are one score
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_scores(row, start, vocab, best, temperature, TILE: tl.constexpr):
    """Logits relative to the best, over the temperature; rounded as every other implementation
    rounds, or equal scores would not be equal everywhere."""
    ids = start + tl.arange(0, TILE)
    logits = tl.load(row + ids, mask=ids < vocab, other=float("-inf"))
    return ids, tl.div_rn(logits - best, temperature)


@triton.jit
def _count_from(row, vocab, best, temperature, bound, TILE: tl.constexpr):
    """How many scores are at or above ``bound``."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        ids, scores = _load_scores(row, start, vocab, best, temperature, TILE)
        counts += ((_order(scores) >= bound) & (ids < vocab)).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _mass_above(row, vocab, best, temperature, bound, TILE: tl.constexpr):
    """Sum of exp(score) over the scores above ``bound``."""
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        _, scores = _load_scores(row, start, vocab, best, temperature, TILE)
        mass += tl.where(_order(scores) > bound, tl.exp(scores), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _weight_of(order):
    """exp of the score that has this order."""
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return tl.exp(bits.to(tl.float32, bitcast=True))


@triton.jit
def _sample_kernel(
    tokens,
    logits,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    keys,
    vocab,
    stride_logits,
    TILE: tl.constexpr,
):
    """Program r: row r."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride_logits
    temperature = tl.load(temperatures + r)

    best_of = tl.full([TILE], float("-inf"), tl.float32)
    id_of = tl.zeros([TILE], tl.int32)
    nans = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        values = tl.load(row + ids, mask=ids < vocab, other=float("-inf"))
        better = values > best_of
        best_of = tl.where(better, values, best_of)
        id_of = tl.where(better, ids, id_of)
        nans += (values != values).to(tl.int32)
    best = tl.max(best_of, axis=0)
    token = tl.min(tl.where(best_of == best, id_of, vocab), axis=0)
    usable = (best > float("-inf")) & (best < float("inf")) & (tl.sum(nans, axis=0) == 0)

    if usable & (temperature > 0):
        top_k = tl.load(top_ks + r)
        top_p = tl.load(top_ps + r)
        threshold = tl.full([], _LOWEST, tl.int32)
        ties = tl.full([], 2147483647, tl.int32)  # how many at the threshold are kept
        if (top_k > 0) & (top_k < vocab):
            low = tl.full([], _LOWEST, tl.int32)
            high = tl.full([], _HIGHEST, tl.int32)
            while low < high:
                middle = low + (high - low + 1) // 2
                if _count_from(row, vocab, best, temperature, middle, TILE) >= top_k:
                    low = middle
                else:
                    high = middle - 1
            threshold = low
            ties = top_k - _count_from(row, vocab, best, temperature, low + 1, TILE)
        if top_p < 1.0:
            mass = _mass_above(row, vocab, best, temperature, threshold, TILE)
            if threshold > _LOWEST:
                mass += ties.to(tl.float32) * _weight_of(threshold)
            wanted = top_p * mass
            low = threshold
            high = tl.full([], _HIGHEST, tl.int32)
            while low < high:
                middle = low + (high - low) // 2
                if _mass_above(row, vocab, best, temperature, middle, TILE) < wanted:
                    high = middle
                else:
                    low = middle + 1
            missing = wanted - _mass_above(row, vocab, best, temperature, low, TILE)
            needed = tl.ceil(missing / _weight_of(low))
            needed = tl.minimum(tl.maximum(needed, 1.0), 1073741824.0).to(tl.int32)
            ties = tl.where(low == threshold, tl.minimum(ties, needed), needed)
            threshold = low

        log_min_p = tl.load(log_min_ps + r)
        key_0 = tl.load(keys + 2 * r)
        key_1 = tl.load(keys + 2 * r + 1)
        best_of = tl.full([TILE], float("-inf"), tl.float32)
        id_of = tl.zeros([TILE], tl.int32)
        seen = tl.full([], 0, tl.int32)
        for start in range(0, vocab, TILE):
            ids, scores = _load_scores(row, start, vocab, best, temperature, TILE)
            order = _order(scores)
            equal = ((order == threshold) & (ids < vocab)).to(tl.int32)
            rank = seen + tl.cumsum(equal, axis=0)  # 1 is the first of those equal
            seen += tl.sum(equal, axis=0)
            kept = (order > threshold) | ((equal > 0) & (rank <= ties))
            kept = kept & (scores >= log_min_p)
            noise = -tl.log(-tl.log(_uniform(key_0, key_1, ids)))
            noisy = tl.where(kept, scores + noise, float("-inf"))
            better = noisy > best_of
            best_of = tl.where(better, noisy, best_of)
            id_of = tl.where(better, ids, id_of)
        winner = tl.max(best_of, axis=0)
        token = tl.min(tl.where(best_of == winner, id_of, vocab), axis=0)

    tl.store(tokens + r, tl.where(usable, token, -1).to(tl.int64))


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """See ``reference.sample``."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits) > 0:
        if logits.stride(-1) != 1:
            raise ValueError("the rows of logits must be contiguous")
        _sample_kernel[(len(logits),)](
            tokens, logits, rows.temperature, rows.top_k, rows.top_p, rows.log_min_p, rows.keys,
            logits.shape[1], logits.stride(0), TILE=_TILE, num_warps=8,
        )  # fmt: skip
    return tokens


@triton.jit
def _uniform_kernel(out, keys, count, TILE: tl.constexpr):
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + ids, _uniform(tl.load(keys), tl.load(keys + 1), ids), mask=ids < count)


def uniforms(key: torch.Tensor, count: int) -> torch.Tensor:
    """The uniform numbers behind the noise of tokens 0 to ``count``, for comparing bits.

    Args:
        key: ``[2]`` int32.
    """
    out = torch.empty(count, dtype=torch.float32, device=key.device)
    _uniform_kernel[(triton.cdiv(count, _TILE),)](out, key, count, TILE=_TILE)
    return out
