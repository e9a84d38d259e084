"""Matrices for products with few rows: float16 weights, float32 inputs and outputs.

FBGEMM, which is part of torch, unpacks float16 weights into float32 registers as they come from
memory. Where the CPU multiplies bfloat16 at half the speed of float32 (AVX512-BF16 without AMX),
that is faster from one row on than bfloat16 itself, needs no conversion around the product, and
costs a third of oneDNN's time to call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_LARGEST = 65_504.0  # of float16
_ENGINES = ("x86", "fbgemm")
# An operator that takes packed weights costs 14 us to call from Python, and 5 us through a graph.
_GRAPH = """
graph(%x : Tensor, %weight : __torch__.torch.classes.quantized.LinearPackedParamsBase):
  %y : Tensor = quantized::linear_dynamic_fp16(%x, %weight)
  return (%y)
"""


def is_faster() -> bool:
    """Whether few rows are multiplied faster so than in bfloat16 on this CPU."""
    features = torch.cpu.get_capabilities()
    known = torch.backends.quantized.engine in _ENGINES
    return known and bool(features.get("avx512_bf16")) and not features.get("amx_bf16")


def fits(weight: torch.Tensor) -> bool:
    """Whether all of ``weight`` is within float16's range."""
    return bool(weight.abs().max() <= _LARGEST)


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """``weight``, float32 ``[N, K]`` that fits, as ``multiply`` wants it. One thread does it, at
    about 15 ns a weight; several may at once."""
    return torch.ops.quantized.linear_prepack_fp16(weight, None if bias is None else bias.float())


def multiply(x: torch.Tensor, packed: Any) -> torch.Tensor:
    """``x @ weight.T + bias`` of float32 ``x``."""
    return _product()(x, packed)


@cache
def _product() -> Any:
    return torch._C._create_function_from_graph("mell_narrow", torch._C.parse_ir(_GRAPH))
