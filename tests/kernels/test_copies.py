"""KV writes, and blocks taken out of a pool and put into another: exact, in every type."""

from __future__ import annotations

import pytest
import torch
from mell_kernels import reference

from tests.kernels.cases import Case, build
from tests.kernels.conftest import Run

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


def check_write(device: str, case: Case, dtype: str) -> None:
    from mell_kernels import triton_copies

    batch, plain = build(case, getattr(torch, dtype), device), build(case, getattr(torch, dtype))
    for write, b in ((triton_copies.write_kv, batch), (reference.write_kv, plain)):
        value = None if case.shared else b.value
        write(b.keys, b.values, b.key, value, b.meta.slot_mapping)
    for pool, wanted in ((batch.keys, plain.keys), (batch.values, plain.values)):
        assert torch.equal(pool.cpu().isnan(), wanted.isnan())
        assert torch.equal(pool.cpu().nan_to_num(), wanted.nan_to_num())


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case(()),
        Case(((5, 1),)),
        Case(((5, 1), (0, 9), (16, 3)), kv_heads=3, heads=3, dim=24, block_size=8),
        Case(((0, 5), (2, 2)), kv_heads=1, dim=40, block_size=1, shared=True),
    ],
    ids=str,
)
def test_write_kv(run: Run, case: Case, dtype: str) -> None:
    run(check_write, case, dtype)


def check_blocks(device: str, dtype: str, shape: tuple[int, ...], ids: list[int]) -> None:
    from mell_kernels import triton_copies

    generator = torch.Generator().manual_seed(len(ids))
    pool = torch.randn((9, *shape), generator=generator).to(getattr(torch, dtype))
    block_ids = torch.tensor(ids, dtype=torch.int64)
    data = triton_copies.gather_blocks(pool.to(device), block_ids.to(device))
    assert torch.equal(data.cpu(), reference.gather_blocks(pool, block_ids))
    target, wanted = torch.zeros_like(pool, device=device), torch.zeros_like(pool)
    moved = block_ids.flip(0)
    triton_copies.scatter_blocks(target, moved.to(device), data)
    reference.scatter_blocks(wanted, moved, data.cpu())
    assert torch.equal(target.cpu(), wanted)


@DTYPES
@pytest.mark.parametrize("ids", [[], [3], [7, 1, 8, 2]], ids=len)
@pytest.mark.parametrize("shape", [(2, 2, 4, 3, 24), (1, 2, 1, 1, 5), (3, 2, 16, 2, 32)], ids=str)
def test_blocks_move(run: Run, dtype: str, shape: tuple[int, ...], ids: list[int]) -> None:
    run(check_blocks, dtype, shape, ids)


def check_far_blocks(device: str) -> None:
    """Offsets beyond 32 bits: 2**33 elements of uint8 would be 8 GiB, so only on a device."""
    from mell_kernels import triton_copies

    pool = torch.empty(3, 1, 1, 1 << 10, 1, 3 << 20, dtype=torch.uint8, device=device)
    pool[2] = 7
    data = triton_copies.gather_blocks(pool, torch.tensor([2], device=device))
    assert bool((data == 7).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offsets_beyond_32_bits() -> None:
    check_far_blocks("cuda")
