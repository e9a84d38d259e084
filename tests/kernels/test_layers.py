"""RMSNorm and rotary embedding against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from mell_kernels import reference

from tests.kernels.conftest import Run

TOLERANCE = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def random(dtype: str, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def close(actual: torch.Tensor, wanted: torch.Tensor, dtype: str) -> None:
    assert actual.dtype == getattr(torch, dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.cpu().double(), wanted, atol=tolerance, rtol=tolerance)


def check_norm(
    device: str, dtype: str, shape: tuple[int, ...], with_residual: bool, gemma: bool
) -> None:
    from mell_kernels import triton_layers

    x, weight = random(dtype, 0, *shape), random(dtype, 1, shape[-1])
    residual = random(dtype, 2, *shape) if with_residual else None
    options = {"weight_offset": 1.0 if gemma else 0.0, "round_first": not gemma}
    out, summed = triton_layers.rms_norm(
        x.to(device),
        weight.to(device),
        1e-5,
        residual=None if residual is None else residual.to(device),
        **options,
    )
    wide = None if residual is None else residual.double()
    wanted, wanted_sum = reference.rms_norm(
        x.double(), weight.double(), 1e-5, residual=wide, **options
    )
    close(out, wanted, dtype)
    close(summed, wanted_sum, dtype)


@DTYPES
@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 96), (1, 5, 1030)], ids=str)
def test_rms_norm(
    run: Run, dtype: str, shape: tuple[int, ...], with_residual: bool, gemma: bool
) -> None:
    run(check_norm, dtype, shape, with_residual, gemma)


def check_rotary(device: str, dtype: str, tokens: int, heads: int, dim: int, turned: int) -> None:
    from mell_kernels import triton_layers

    x = random(dtype, 0, heads, tokens, dim)
    angles = random("float32", 1, tokens, turned).to(getattr(torch, dtype))
    cos, sin = angles.cos(), angles.sin()
    out = triton_layers.rotary(x.to(device).transpose(0, 1), cos.to(device), sin.to(device))
    wanted = reference.rotary(x.transpose(0, 1).double(), cos.double(), sin.double())
    close(out, wanted, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "turned"),
    [(0, 2, 16, 16), (1, 1, 8, 8), (5, 3, 24, 24), (4, 5, 80, 32), (7, 2, 64, 64)],
)
def test_rotary(run: Run, dtype: str, tokens: int, heads: int, dim: int, turned: int) -> None:
    run(check_rotary, dtype, tokens, heads, dim, turned)
