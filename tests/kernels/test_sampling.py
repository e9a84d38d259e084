"""The fused sampling kernel draws the very tokens that the reference draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mell_kernels import reference
from mell_kernels.rows import SamplingRows
from mell_kernels.sampling import gumbel, noise_key

from tests.kernels.conftest import Run

FIELDS = ("temperature", "top_k", "top_p", "log_min_p", "keys")


def rows_of(params: list[tuple[float, int, float, float]], seed: int) -> SamplingRows:
    """``params``: temperature, top_k, top_p and min_p of each row."""
    columns = list(zip(*params, strict=True)) or [(), (), (), ()]
    keys = [noise_key(seed, position) for position in range(len(params))]
    return SamplingRows(
        temperature=torch.tensor(columns[0], dtype=torch.float32),
        top_k=torch.tensor(columns[1], dtype=torch.int32),
        top_p=torch.tensor(columns[2], dtype=torch.float32),
        log_min_p=torch.tensor(columns[3], dtype=torch.float32).log(),
        keys=torch.tensor(keys, dtype=torch.int32).view(-1, 2),
    )


def random_rows(rng: np.random.Generator, count: int, vocab: int) -> SamplingRows:
    params = [
        (
            float(rng.choice([0.0, 0.3, 1.0, 2.5])),
            int(rng.choice([0, 0, 1, 3, 20, vocab, vocab + 9])),
            float(rng.choice([1.0, 1.0, 0.1, 0.5, 0.95])),
            float(rng.choice([0.0, 0.0, 0.02, 0.5])),
        )
        for _ in range(count)
    ]
    return rows_of(params, int(rng.integers(1 << 40)))


def draw(device: str, logits: torch.Tensor, rows: SamplingRows) -> list[int]:
    from mell_kernels import triton_sampling

    there = SamplingRows(*(getattr(rows, name).to(device) for name in FIELDS))
    return triton_sampling.sample(logits.to(device), there).tolist()


def check_random(device: str, seed: int, vocab: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 5, vocab)
    logits = torch.from_numpy(rng.standard_normal((5, vocab))).float() * float(rng.choice([1, 6]))
    if ties:
        logits = logits.round()
    logits[:, rng.integers(vocab)] = -torch.inf
    assert draw(device, logits, rows) == reference.sample(logits, rows).tolist()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("seed", "vocab"), [(0, 2), (1, 50), (2, 5001)])
def test_tokens_of_the_reference(run: Run, seed: int, vocab: int, ties: bool) -> None:
    run(check_random, seed, vocab, ties)


def check_edges(device: str) -> None:
    flat = torch.zeros(7, 40)
    flat[1, 3] = torch.nan
    flat[2] = -torch.inf
    flat[3, 5] = torch.inf
    flat[4] = -torch.inf
    flat[4, 7] = -3.0
    flat[5, 11:] = 1.0
    plain = (1.0, 0, 1.0, 0.0)
    greedy = (0.0, 5, 0.5, 0.5)
    # All forty are equal in row 6: the limits keep its first three.
    rows = rows_of([greedy, plain, plain, plain, plain, greedy, (1.0, 3, 1.0, 0.0)], 1)
    tokens = draw(device, flat, rows)
    assert tokens[:6] == [0, -1, -1, -1, 7, 11]
    assert tokens[6] in (0, 1, 2)
    assert tokens == reference.sample(flat, rows).tolist()
    assert draw(device, flat[:0], rows_of([], 0)) == []


def test_edges(run: Run) -> None:
    run(check_edges)


def check_noise(device: str) -> None:
    from mell_kernels import triton_sampling

    key = torch.tensor(noise_key(12345678901, 77), dtype=torch.int32)
    uniforms = triton_sampling.uniforms(key.to(device), 9000).cpu()
    noise = gumbel(key, torch.arange(9000, dtype=torch.int32))
    assert torch.equal(-(-uniforms.log()).log(), noise)


def test_the_noise_comes_from_the_same_bits(run: Run) -> None:
    run(check_noise)
