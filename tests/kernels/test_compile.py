"""Every kernel compiles for real devices, though none is here.

Triton brings its compiler and ptxas along. A stand-in for the driver names the architecture, and
each launch ends after compiling: what is compiled is what the wrappers would launch, types,
strides, alignment and all. That finds what the interpreter lets pass: shapes and types that the
compiler refuses, and more shared memory than the smallest devices have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from mell_kernels import (
    triton_chunks,
    triton_copies,
    triton_decode,
    triton_layers,
    triton_sampling,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.cases import Case, build
from tests.kernels.test_sampling import rows_of

# What a program may use on sm_86 and sm_89, the least of all since sm_80.
SHARED_MEMORY = 99 << 10


class Device:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def compiled(
    arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> list[triton.compiler.CompiledKernel]:
    """What launches have compiled so far."""
    kernels: list[triton.compiler.CompiledKernel] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(driver, "_active", Device(arch))
    return kernels


def attend(case: Case, dtype: torch.dtype, splits: int) -> None:
    batch = build(case, dtype)
    meta, out = batch.meta, torch.empty_like(batch.query.contiguous())
    options = {"scale": 0.1, "window": case.window, "softcap": case.softcap, "sinks": batch.sinks}
    common = (batch.query, batch.keys, batch.values, meta.block_tables, meta.seq_lens)
    if splits:
        triton_decode.decode(*common, out, splits=splits, **options)
    else:
        triton_chunks.chunks(
            *common, meta.cu_seqlens_q, out, num_tokens=len(batch.query), **options
        )


LLAMA = Case(((40, 1), (3, 1)), heads=32, kv_heads=8, dim=128, block_size=16)
GEMMA = Case(((40, 2),), heads=8, kv_heads=4, dim=256, block_size=16, window=7, softcap=50.0)
GPT_OSS = Case(((40, 1),), heads=8, kv_heads=1, dim=64, block_size=16, window=128, sinks=True)
ODD = Case(((9, 1), (4, 1), (2, 1)), heads=7, kv_heads=1, dim=80, block_size=1)
MLA = Case(((9, 1),), heads=128, kv_heads=1, dim=576, block_size=16, shared=True)


def write(case: Case, dtype: torch.dtype) -> None:
    batch = build(case, dtype)
    value = None if case.shared else batch.value
    triton_copies.write_kv(batch.keys, batch.values, batch.key, value, batch.meta.slot_mapping)


def move(dtype: torch.dtype) -> None:
    pool = torch.zeros(4, 2, 2, 16, 2, 24, dtype=dtype)
    ids = torch.tensor([1, 2])
    triton_copies.scatter_blocks(pool, ids, triton_copies.gather_blocks(pool, ids))


def norm(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(3, 96, dtype=dtype), torch.zeros(96, dtype=dtype)
    triton_layers.rms_norm(x, weight, 1e-5)
    triton_layers.rms_norm(x, weight, 1e-5, residual=x, weight_offset=1.0, round_first=False)


def rotate(dtype: torch.dtype) -> None:
    cos = torch.zeros(3, 32, dtype=dtype)
    triton_layers.rotary(torch.zeros(3, 5, 32, dtype=dtype), cos, cos)
    triton_layers.rotary(torch.zeros(3, 5, 80, dtype=dtype), cos, cos)


def draw(dtype: torch.dtype) -> None:
    triton_sampling.sample(torch.zeros(2, 300, dtype=dtype), rows_of([(1.0, 0, 1.0, 0.0)] * 2, 0))


LAUNCHES: dict[str, tuple[Callable[[], None], int]] = {  # and how many kernels it is
    "decode-bf16": (lambda: attend(LLAMA, torch.bfloat16, 4), 2),
    "decode-fp16": (lambda: attend(GPT_OSS, torch.float16, 1), 1),
    "decode-fp32": (lambda: attend(ODD, torch.float32, 2), 2),
    "decode-256": (lambda: attend(GEMMA, torch.bfloat16, 1), 1),
    "chunks-bf16": (lambda: attend(LLAMA, torch.bfloat16, 0), 1),
    "chunks-fp16": (lambda: attend(GPT_OSS, torch.float16, 0), 1),
    "chunks-fp32": (lambda: attend(GEMMA, torch.float32, 0), 1),
    "decode-mla": (lambda: attend(MLA, torch.bfloat16, 2), 2),
    "chunks-mla": (lambda: attend(MLA, torch.bfloat16, 0), 1),
    "write-bf16": (lambda: write(LLAMA, torch.bfloat16), 1),
    "write-fp32": (lambda: write(MLA, torch.float32), 1),
    "blocks": (lambda: move(torch.bfloat16), 2),
    "norm-bf16": (lambda: norm(torch.bfloat16), 2),
    "norm-fp32": (lambda: norm(torch.float32), 2),
    "rotary-bf16": (lambda: rotate(torch.bfloat16), 2),
    "rotary-fp32": (lambda: rotate(torch.float32), 2),
    "sample": (lambda: draw(torch.float32), 1),
}


# Every kernel for both; every type and shape only for the newer one, or the suite would be slow.
ON_SM80 = (
    "decode-bf16",
    "chunks-fp16",
    "write-fp32",
    "blocks",
    "norm-bf16",
    "rotary-bf16",
    "sample",
)


@pytest.mark.parametrize(
    ("arch", "name"), [*((80, name) for name in ON_SM80), *((90, name) for name in LAUNCHES)]
)
def test_compiles(name: str, compiled: list[triton.compiler.CompiledKernel]) -> None:
    launch, count = LAUNCHES[name]
    launch()
    assert len(compiled) == count
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY
