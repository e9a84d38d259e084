"""The small operations between the matrix products of a layer, each one kernel instead of many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    out,
    residual_out,
    x,
    residual,
    weight,
    size,
    eps,
    weight_offset,
    RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PAD)
    inside = columns < size
    at = row * size + columns
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual_out.dtype.element_ty)
        tl.store(residual_out + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, axis=0) / size
    normed = values * tl.rsqrt(mean + eps)
    if ROUND_FIRST:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(out + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    round_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.rms_norm``."""
    size = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    summed = x
    if residual is not None:
        residual = residual.contiguous()
        summed = torch.empty_like(x)
    rows = x.numel() // size
    if rows > 0:
        pad = triton.next_power_of_2(size)
        _rms_norm_kernel[(rows,)](
            out, summed, x, x if residual is None else residual, weight.contiguous(),
            size, eps, weight_offset,
            RESIDUAL=residual is not None, ROUND_FIRST=round_first, PAD=pad,
            num_warps=min(16, max(1, pad // 512)),
        )  # fmt: skip
    return out, summed


@triton.jit
def _rotary_kernel(
    x_out,
    x,
    cos,
    sin,
    num_heads,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEADS: tl.constexpr,
):
    """Program t: all heads of token t. Element d is paired with d + HALF; what is behind the
    rotated 2 * HALF is copied."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, PAD_HEADS)[:, None]
    dims = tl.arange(0, PAD_HALF)[None, :]
    inside = (heads < num_heads) & (dims < HALF)
    source = x + token * stride_xt + heads * stride_xh + dims
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    # cos and sin of the two halves are loaded apart: some models scale them differently.
    cos_at = cos + token * stride_cos + dims
    sin_at = sin + token * stride_sin + dims
    cos_1 = tl.load(cos_at, mask=dims < HALF, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_at + HALF, mask=dims < HALF, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_at, mask=dims < HALF, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_at + HALF, mask=dims < HALF, other=0.0).to(tl.float32)
    target = x_out + (token * num_heads + heads) * DIM + dims
    kind: tl.constexpr = x_out.dtype.element_ty
    tl.store(target, (first * cos_1 - second * sin_1).to(kind), mask=inside)
    tl.store(target + HALF, (second * cos_2 + first * sin_2).to(kind), mask=inside)
    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, PAD_REST)[None, :]
        behind = (heads < num_heads) & (rest < DIM)
        kept = tl.load(x + token * stride_xt + heads * stride_xh + rest, mask=behind, other=0.0)
        tl.store(x_out + (token * num_heads + heads) * DIM + rest, kept, mask=behind)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See ``reference.rotary``."""
    num_tokens, num_heads, dim = x.shape
    half = cos.shape[-1] // 2
    if cos.stride(-1) != 1 or sin.stride(-1) != 1 or x.stride(-1) != 1:
        raise ValueError("the last dimension of x, cos and sin must be contiguous")
    out = torch.empty((num_tokens, num_heads, dim), dtype=x.dtype, device=x.device)
    if num_tokens > 0:
        _rotary_kernel[(num_tokens,)](
            out, x, cos, sin, num_heads, *x.stride()[:2], cos.stride(0), sin.stride(0),
            DIM=dim, HALF=half, PAD_HALF=triton.next_power_of_2(half),
            PAD_REST=triton.next_power_of_2(max(1, dim - 2 * half)),
            PAD_HEADS=triton.next_power_of_2(num_heads),
        )  # fmt: skip
    return out
