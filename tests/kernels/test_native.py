"""Compiled products against the same in float64, on every kind of CPU that this one stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mell_kernels import native

from tests.kernels.native_cases import PRODUCT, threads

pytestmark = pytest.mark.usefixtures("compiled")


def check_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    given = x.clone()
    y = native.pack(weight, bias)(x)
    assert torch.equal(x, given)
    assert y.dtype == torch.float32
    exact = x.double() @ weight.double().T
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    room = PRODUCT * size
    if bias is not None:
        exact = exact + bias.double()
        room = room + 1e-6 * bias.double().abs()
    assert ((y - exact).abs() <= room).all()


def matrix(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k).bfloat16()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 200),
    n=st.integers(1, 150),
    pairs=st.integers(1, 300),
    biased=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_products_of_all_sizes(rows: int, n: int, pairs: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    bias = torch.randn(n).bfloat16() if biased else None
    check_product(torch.randn(rows, 2 * pairs), matrix(n, 2 * pairs), bias)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 11, 12, 13, 95, 96, 97, 193])
def test_products_do_not_depend_on_who_computes_them(rows: int, count: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 322), matrix(77, 322)
    subject = native.pack(weight)
    with threads(1):
        alone = subject(x)
    with threads(count):
        assert torch.equal(subject(x), alone)
        check_product(x, weight, None)


def test_products_are_as_exact_as_they_say_on_the_whole() -> None:
    """Errors of all outputs together, which have no reason to be on one side."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 1024), matrix(160, 1024)
    exact = x.double() @ weight.double().T
    error = native.pack(weight)(x) - exact
    assert error.square().mean().sqrt() <= 1.5e-3 * exact.square().mean().sqrt()
    assert error.mean().abs() <= 1e-4 * exact.square().mean().sqrt()


@pytest.mark.parametrize("inputs", [2, 30, 32, 34, 400])
@pytest.mark.parametrize("size", [1.0, 1.99, 2.0, 1e-20, 3e20])
def test_sums_that_only_grow(inputs: int, size: float) -> None:
    """The largest that can come of it, and rounding that may go to one side each time."""
    x = torch.full((3, inputs), size) * torch.tensor([[1.0], [-1.0], [0.999]])
    weight = torch.full((20, inputs), 1.9921875).bfloat16()
    exact = x.double() @ weight.double().T
    assert ((native.pack(weight)(x) - exact).abs() <= 32 * 2.0**-11 * exact.abs()).all()


def test_rows_of_all_magnitudes() -> None:
    torch.manual_seed(0)
    for size in (1e-6, 1.0, 1e4):
        check_product(size * torch.randn(14, 130), matrix(50, 130), None)
    sizes = torch.logspace(-30, 30, 41)[:, None]
    check_product(sizes * torch.randn(41, 130), matrix(50, 130), None)
    one_is_large = torch.randn(40, 130)
    one_is_large[:, 7] = 1e4
    check_product(one_is_large, matrix(50, 130), None)


def test_weights_of_all_magnitudes() -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-6, 5, 50)[:, None]
    check_product(torch.randn(14, 130), (sizes * torch.randn(50, 130)).bfloat16(), None)
    one_is_large = matrix(50, 130)
    one_is_large[:, 7] = 1e4
    check_product(torch.randn(14, 130), one_is_large, None)


def test_nothing_comes_of_nothing() -> None:
    torch.manual_seed(0)
    weight, bias = matrix(37, 64), torch.randn(37)
    weight[5] = 0.0
    x = torch.randn(15, 64)
    x[3] = 0.0
    y, shifted = native.pack(weight)(x), native.pack(weight, bias)(x)
    assert (y[3] == 0).all()
    assert (y[:, 5] == 0).all()
    assert torch.equal(shifted[3], bias)
    assert (shifted[:, 5] == bias[5]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_stays_alone(bad: float) -> None:
    torch.manual_seed(0)
    weight, x = matrix(50, 66), torch.randn(29, 66)
    subject = native.pack(weight)
    good = subject(x)
    for some in (slice(7, 8), slice(0, None, 9), slice(None)):
        x[13] = torch.randn(66)
        x[13, some] = bad
        y = subject(x)
        assert not y[13].isfinite().any()
        y[13] = good[13]
        assert torch.equal(y, good)


def test_what_is_possible() -> None:
    assert native.is_possible(128, [64, 66])
    assert not native.is_possible(128, [64, 65])
    assert not native.is_possible(24, [64])
    assert not native.is_possible(512, [64])
