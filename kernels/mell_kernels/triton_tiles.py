"""What Triton's attention kernels are made of: tiles of keys read through the block table and
folded into a running softmax.

A tile of keys has nothing to do with ``block_size``, so every block size works. The query heads
that share a KV head are the rows of one matrix, so a key is loaded once for all of them. A head_dim
that is no power of two is a power of two and a rest, each a matrix product of its own: 576, of
latent attention, would otherwise be computed as 1024.

What the compiler needs and the interpreter forgives is kept throughout: ``tl.arange`` over powers
of two only, ``tl.dot`` of at least 16 in each dimension, fp32 dots in IEEE precision (the default
would be TF32), accumulators of one type in all iterations, 64-bit offsets into the pool, and no
arithmetic in 16-bit floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MIN_DOT = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one program works on at once."""

    keys: int
    rows: int  # at most; (query, head) pairs
    num_warps: int
    num_stages: int = 3  # block table, keys and values, products


def tiling(head_dim: int, itemsize: int) -> Tiling:
    """By the bytes of one key, so that a multiprocessor with 99 KiB of shared memory, the smallest
    since sm_80, can hold its part."""
    row = _width(head_dim) * itemsize
    if row <= 256:
        return Tiling(keys=64, rows=64, num_warps=4)
    if row <= 512:
        return Tiling(keys=32, rows=64 if itemsize < 4 else 32, num_warps=4)
    return Tiling(keys=16, rows=16, num_warps=4)


def _width(dim: int) -> int:
    """The largest power of two in ``dim``; what is left is computed apart."""
    power = triton.next_power_of_2(dim)
    return max(MIN_DOT, power if power == dim else power // 2)


@triton.jit
def softcapped(scores, cap):
    # tanh(x) = 2 sigmoid(2 x) - 1; libdevice's tanh does not exist in the interpreter.
    return cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)


@triton.jit
def load_query(query, rows_at, real, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of queries, ``[ROWS, MAIN]`` and ``[ROWS, REST]``; zeros where not ``real``."""
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    at = query + rows_at[:, None]
    first = tl.load(at + main[None, :], mask=real[:, None] & (main < DIM)[None, :], other=0.0)
    second = tl.load(at + rest[None, :], mask=real[:, None] & (rest < DIM)[None, :], other=0.0)
    return first, second


@triton.jit
def fold_tile(
    k_cache,
    v_cache,
    table,
    positions,
    inside,
    visible,
    q_main,
    q_rest,
    best,
    total,
    acc_main,
    acc_rest,
    scale,
    softcap,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    SOFTCAP: tl.constexpr,
    SAME: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One step of the online softmax, in base 2, over the keys at ``positions``: ``best`` is the
    running maximum, ``total`` the sum of weights, ``acc`` the weighted sum of values.

    Keys and values are 0 where not ``inside``: what a freed block holds there may be NaN, and no
    weight of 0 undoes a NaN.
    """
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    offsets = (positions % BLOCK_SIZE).to(tl.int64)
    k_rows = k_cache + blocks * stride_kb + offsets * stride_kt
    v_rows = v_cache + blocks * stride_vb + offsets * stride_vt

    k_main = tl.load(
        k_rows[None, :] + main[:, None], mask=inside[None, :] & (main < DIM)[:, None], other=0.0
    )
    scores = tl.dot(q_main, k_main, input_precision="ieee")
    if DIM > MAIN:
        k_rest = tl.load(
            k_rows[None, :] + rest[:, None], mask=inside[None, :] & (rest < DIM)[:, None], other=0.0
        )
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    scores = scores * scale
    if SOFTCAP:
        scores = softcapped(scores, softcap)
    scores = tl.where(visible, scores * LOG2E, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # A row that has seen no key yet must not compute -inf - -inf.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, axis=1)

    if SAME:
        v_main = tl.trans(k_main)
    else:
        v_main = tl.load(
            v_rows[:, None] + main[None, :], mask=inside[:, None] & (main < DIM)[None, :], other=0.0
        )
    weights = weights.to(v_main.dtype)
    acc_main = tl.dot(weights, v_main, acc_main * shrink[:, None], input_precision="ieee")
    if DIM > MAIN:
        if SAME:
            v_rest = tl.trans(k_rest)
        else:
            v_rest = tl.load(
                v_rows[:, None] + rest[None, :],
                mask=inside[:, None] & (rest < DIM)[None, :],
                other=0.0,
            )
        acc_rest = tl.dot(weights, v_rest, acc_rest * shrink[:, None], input_precision="ieee")
    return new_best, total, acc_main, acc_rest


@triton.jit
def store_rows(
    out, rows_at, real, main_values, rest_values,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = out.dtype.element_ty
    main = tl.arange(0, MAIN)
    at = out + rows_at[:, None]
    mask = real[:, None] & (main < DIM)[None, :]
    tl.store(at + main[None, :], main_values.to(kind), mask=mask)
    if DIM > MAIN:
        rest = MAIN + tl.arange(0, REST)
        mask = real[:, None] & (rest < DIM)[None, :]
        tl.store(at + rest[None, :], rest_values.to(kind), mask=mask)


@dataclass(frozen=True, slots=True)
class Shape:
    """What both kernels are compiled for, and the strides that they take."""

    group: int
    tiling: Tiling
    strides: tuple[int, ...]
    constants: dict[str, int | bool]

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> Shape:
        if query.stride(-1) != 1 or keys.stride(-1) != 1 or values.stride(-1) != 1:
            raise ValueError("the last dimension of query, keys and values must be contiguous")
        if keys.shape != values.shape:
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} differ")
        _, block_size, kv_heads, dim = keys.shape
        group, main = query.shape[1] // kv_heads, _width(dim)
        constants = {
            "WINDOW": window or 0,
            "SOFTCAP": softcap is not None,
            "SINKS": sinks is not None,
            "SAME": keys.data_ptr() == values.data_ptr(),
            "GROUP": group,
            "DIM": dim,
            "MAIN": main,
            "REST": max(MIN_DOT, triton.next_power_of_2(max(1, dim - main))),
            "BLOCK_SIZE": block_size,
        }
        strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
        return cls(group, tiling(dim, keys.itemsize), strides, constants)
