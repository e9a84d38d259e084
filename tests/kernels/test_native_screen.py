"""The largest output by way of compiled int8 codes: always the exact one, or none."""

from __future__ import annotations

import pytest
import torch
from mell_kernels import native, native_screen, ops
from mell_kernels.native_screen import NativeScreen

from tests.kernels.native_cases import normed, threads

pytestmark = pytest.mark.usefixtures("compiled", "possible")

EPS = 0.1


@pytest.fixture
def possible(compiled: None) -> None:
    del compiled
    if not native_screen.is_possible(torch.ones(1 << 11, 1 << 11, dtype=torch.bfloat16)):
        pytest.skip("needs AVX512-VNNI")


class Head:
    """The last norm, the matrix that gives the logits, and its screen."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.bfloat16()
        self.gain = 1 + 0.3 * torch.randn(weight.shape[1])
        self.screen = NativeScreen.of(self.weight)
        self.packed = native.pack(self.weight)

    def likeliest(self, x: torch.Tensor) -> list[int] | None:
        given = x.clone()
        ids = self.screen.likeliest(x, self.gain, EPS, self.packed)
        torch.testing.assert_close(x, given, rtol=0, atol=0, equal_nan=True)
        return None if ids is None else ids.tolist()

    def exact(self, x: torch.Tensor) -> list[int]:
        logits = normed(x.double(), self.gain, EPS) @ self.weight.double().T
        return ops.likeliest(logits).tolist()


@pytest.mark.parametrize("rows", [1, 2, 9, 12, 13, 40])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(5000, 96), (4001, 34), (1, 2), (7, 64), (16, 30), (17, 130), (33, 322), (96, 4096)],
)
def test_the_largest_of_random_outputs(rows: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(rows)
    head = Head(torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    for count in (1, 2, 3):
        head.screen.pause = 0
        with threads(count):
            assert head.likeliest(x) == head.exact(x)


def test_weights_of_all_magnitudes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3000, 64) * torch.logspace(-8, 0, 3000)[torch.randperm(3000)][:, None]
    weight[:, 7] *= 300
    head, x = Head(weight), torch.randn(20, 64)
    assert head.likeliest(x) == head.exact(x)


@pytest.mark.parametrize("rounded", ["both", "inputs", "weights"])
def test_outputs_that_int8_cannot_tell_apart(rounded: str) -> None:
    """Of each forty the weights differ by less than what is rounded away: of them, or of what they
    are multiplied by, while codes of the other are exact."""
    torch.manual_seed(0)
    if rounded == "inputs":  # whole numbers to 127
        weight = torch.randint(-100, 101, (100, 1, 64)) + torch.randint(-1, 2, (100, 40, 64))
        weight[..., 0] = 127
    else:
        weight = torch.randn(100, 1, 64) + 4e-3 * torch.randn(100, 40, 64)
    head = Head(weight.flatten(0, 1)[torch.randperm(4000)])
    if rounded == "weights":  # inputs that only differ by their signs
        head.gain.fill_(1.0)
    for _ in range(40):
        head.screen.pause = 0
        x = torch.randn(3, 64)
        if rounded == "weights":
            x.sign_()
        assert head.likeliest(x) == head.exact(x)


def test_a_largest_output_below_zero() -> None:
    torch.manual_seed(0)
    head = Head(-torch.rand(4000, 64) - 0.1)
    head.gain.abs_()
    x = torch.rand(5, 64)
    assert head.likeliest(x) == head.exact(x)


def test_of_equals_the_lowest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4000, 64)
    x = weight[[3000, 17]].clone()
    weight[[3500, 2000, 40]] = weight[[3000, 3000, 17]]
    head = Head(weight)
    head.gain.fill_(1.0)
    for count in (1, 2, 3):
        with threads(count):
            assert head.likeliest(x) == [2000, 17]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_is_named_alone(bad: float) -> None:
    torch.manual_seed(0)
    head, x = Head(torch.randn(4000, 64)), torch.randn(14, 64)
    x[3, 5], x[8] = bad, 0.0
    expected = head.exact(x)
    assert expected[3] == -1
    assert expected[8] == 0
    for count in (1, 2, 3):
        with threads(count):
            assert head.likeliest(x) == expected


def test_left_alone_for_a_while_where_too_many_could_be_the_largest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4000, 64)
    weight[:2000] = weight[0]
    head = Head(weight)
    flat, x = head.weight[:1].float() / head.gain, head.weight[3000:3001].float() / head.gain
    assert head.likeliest(flat) == head.exact(flat)
    assert head.likeliest(x) is None
    answers = [head.likeliest(x) for _ in range(100)]
    assert answers[-1] == head.exact(x)
    assert answers.count(None) > 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_have_no_screen(bad: float) -> None:
    weight = torch.ones(1 << 11, 1 << 11, dtype=torch.bfloat16)
    weight[1000, 7] = bad
    assert not native_screen.is_possible(weight)
