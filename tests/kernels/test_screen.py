"""The largest output by way of int8: always the exact one, or none."""

from __future__ import annotations

import pytest
import torch
from mell_kernels import screen
from mell_kernels.screen import Screen

pytestmark = pytest.mark.skipif(
    not screen.is_possible(torch.empty(1 << 11, 1 << 11)), reason="needs AVX512-VNNI"
)


def exact(x: torch.Tensor, weight: torch.Tensor) -> list[int]:
    return (x.double() @ weight.double().T).argmax(1).tolist()


def likeliest(subject: Screen, x: torch.Tensor) -> list[int] | None:
    with torch.inference_mode():
        ids = subject.likeliest(x)
    return None if ids is None else ids.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_the_largest_of_random_outputs(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(5000, 96).to(dtype)  # two chunks, the second shorter
    x = torch.randn(rows, 96) * torch.logspace(-3, 3, rows)[:, None]
    assert likeliest(Screen(weight), x) == exact(x, weight)


def test_outputs_that_int8_cannot_tell_apart() -> None:
    """Of each forty the weights differ by less than their rounding to int8."""
    torch.manual_seed(0)
    weight = torch.randn(200, 1, 64) + 1e-3 * torch.randn(200, 40, 64)
    weight = weight.flatten(0, 1)
    subject = Screen(weight)
    told = 0
    for _ in range(30):
        subject._pause = 0
        x = torch.randn(2, 64)
        ids = likeliest(subject, x)
        assert ids in (None, exact(x, weight))
        told += ids is not None
    assert told


def test_of_equals_the_lowest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4000, 64)
    x = weight[[3000, 17]].clone()
    weight[[3500, 2000, 40]] = weight[[3000, 3000, 17]]
    assert likeliest(Screen(weight), x) == [2000, 17]


def test_every_row_is_told_or_none() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4000, 64), torch.randn(3, 64)
    for bad in (0.0, torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1] = bad
        assert likeliest(Screen(weight), spoilt) is None
    weight[5, 5] = torch.nan
    assert likeliest(Screen(weight), x) is None


def test_a_layer_is_left_alone_for_a_while_where_too_many_outputs_could_be_the_largest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4000, 64)
    weight[:2000] = weight[0]
    subject, flat = Screen(weight), weight[:1].clone()
    assert likeliest(subject, flat) is None
    x = weight[3000:3001].clone()
    assert likeliest(subject, x) is None
    answers = [likeliest(subject, x) for _ in range(100)]
    assert answers[-1] == [3000]
    assert answers.count(None) > 10


def test_nothing_is_told_of_outputs_below_zero() -> None:
    assert likeliest(Screen(torch.full((4000, 64), -1.0)), torch.ones(1, 64)) is None
