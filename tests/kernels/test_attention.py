"""Both attention kernels against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mell_kernels import reference

from tests.kernels.cases import Case, build
from tests.kernels.conftest import Run

TOLERANCE = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def random_case(seed: int, *, decode: bool) -> Case:
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 3]))
    lengths = tuple(
        (int(rng.integers(0, 90)), 1 if decode else int(rng.integers(1, 40)))
        for _ in range(rng.integers(1, 4))
    )
    return Case(
        lengths=lengths,
        heads=kv_heads * int(rng.choice([1, 2, 5])),
        kv_heads=kv_heads,
        dim=int(rng.choice([16, 24, 40, 64])),
        block_size=int(rng.choice([1, 8, 16, 32])),
        window=[None, None, 1, 7, 33][rng.integers(5)],
        softcap=[None, None, 3.0][rng.integers(3)],
        sinks=bool(rng.integers(2)),
        seed=seed,
    )


def expected(case: Case, dtype: str, scale: float) -> torch.Tensor:
    """Of the very numbers that the kernel gets."""
    batch = build(case, getattr(torch, dtype))
    return reference.paged_attention(
        batch.query.double(),
        batch.keys.double(),
        batch.values.double(),
        batch.meta,
        scale=scale,
        window=case.window,
        softcap=case.softcap,
        sinks=batch.sinks,
    )


def close(out: torch.Tensor, wanted: torch.Tensor, dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), wanted, atol=tolerance, rtol=tolerance)


def check_decode(device: str, case: Case, dtype: str, splits: int) -> None:
    from mell_kernels import triton_decode

    batch = build(case, getattr(torch, dtype), device)
    scale = case.dim**-0.5
    out = torch.full_like(batch.query.contiguous(), torch.nan)
    triton_decode.decode(
        batch.query,
        batch.keys,
        batch.values,
        batch.meta.block_tables,
        batch.meta.seq_lens,
        out,
        splits=splits,
        scale=scale,
        window=case.window,
        softcap=case.softcap,
        sinks=batch.sinks,
    )
    close(out, expected(case, dtype, scale), dtype)


def check_chunks(device: str, case: Case, dtype: str, skipped: int) -> None:
    """The first ``skipped`` sequences are left to the decode kernel, as in a mixed batch."""
    from mell_kernels import triton_chunks

    batch = build(case, getattr(torch, dtype), device)
    meta, scale = batch.meta, case.dim**-0.5
    before = int(meta.cu_seqlens_q[skipped])
    out = torch.full_like(batch.query.contiguous(), torch.nan)
    triton_chunks.chunks(
        batch.query,
        batch.keys,
        batch.values,
        meta.block_tables[skipped:],
        meta.seq_lens[skipped:],
        meta.cu_seqlens_q[skipped:],
        out,
        num_tokens=len(batch.query) - before,
        scale=scale,
        window=case.window,
        softcap=case.softcap,
        sinks=batch.sinks,
    )
    assert out[:before].isnan().all()
    close(out[before:], expected(case, dtype, scale)[before:], dtype)


DECODES = [
    (Case(()), 1),
    (Case(((0, 1),)), 1),
    (Case(((0, 1),)), 4),
    (Case(((0, 1), (63, 1), (64, 1), (199, 1)), block_size=16), 1),
    (Case(((0, 1), (63, 1), (64, 1), (199, 1)), block_size=16, sinks=True), 4),
    (Case(((300, 1),), heads=7, kv_heads=1, dim=80, block_size=32), 8),
    (Case(((150, 1), (9, 1)), window=64, sinks=True, softcap=2.0, block_size=8), 2),
    (Case(((150, 1), (9, 1)), window=1, block_size=1), 2),
    (Case(((70, 1), (5, 1)), heads=66, kv_heads=1, dim=24, shared=True), 2),
    *[(random_case(seed, decode=True), 1 + seed % 2 * 3) for seed in range(5)],
]
CHUNKS = [
    (Case(()), 0),
    (Case(((0, 1),)), 0),
    (Case(((0, 70),), block_size=16), 0),
    (Case(((13, 65), (0, 1), (64, 1), (90, 3)), block_size=16), 0),
    (Case(((20, 1), (33, 1), (5, 40), (0, 17)), block_size=8), 2),
    (Case(((100, 30),), heads=7, kv_heads=1, dim=80, block_size=32), 0),
    (Case(((50, 40), (0, 5)), window=16, sinks=True, softcap=2.0, block_size=1), 0),
    (Case(((70, 9), (5, 2)), heads=96, kv_heads=1, dim=24, shared=True), 0),
    *[(random_case(seed, decode=False), 0) for seed in range(100, 105)],
]


@DTYPES
@pytest.mark.parametrize(("case", "splits"), DECODES, ids=str)
def test_decode(run: Run, case: Case, dtype: str, splits: int) -> None:
    run(check_decode, case, dtype, splits)


@DTYPES
@pytest.mark.parametrize(("case", "skipped"), CHUNKS, ids=str)
def test_chunks(run: Run, case: Case, dtype: str, skipped: int) -> None:
    run(check_chunks, case, dtype, skipped)
