"""What the CPU at hand is good at."""

from __future__ import annotations

import torch


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware. Without that it is emulated, at a fraction
    of float32's speed wherever the memory is not the limit."""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("amx_bf16", "avx512_bf16"))
