"""Where a kernel's check runs: under the Triton interpreter on a CPU, or on a CUDA device.

``TRITON_INTERPRET`` counts when a kernel is decorated, and Triton's own library is decorated when
Triton is imported. So the interpreter gets a process of its own, and whatever else runs in this one
sees no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from mell_kernels import native

from tests.kernels.native_cases import forget_cpu

Run = Callable[..., None]


def _ready() -> None:
    torch.set_num_threads(1)
    import triton

    assert triton.knobs.runtime.interpret


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Run]:
    """``interpreter(check, *args)`` runs ``check(*args)``, a module-level function, there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            pool.submit(_ready).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
        yield lambda check, *args: pool.submit(check, *args).result()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """``run(check, *args)``: ``check(device, *args)``, which fails if a kernel is wrong."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return lambda check, *args: check("cuda", *args)
    params = request.node.callspec.params
    if params.get("dtype") == "bfloat16":
        pytest.skip("the interpreter's bfloat16 is wrong without a word; checked on a device")
    interpreted = request.getfixturevalue("interpreter")
    return lambda check, *args: interpreted(check, "cpu", *args)


_OLDER = {
    "avx2": {"avx2", "fma3"},
    "avx512": {
        *("avx2", "fma3", "avx512_vnni"),
        *("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"),
    },
}


@pytest.fixture(scope="module", params=["own", *_OLDER])
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """``native`` for this CPU, and for older ones that it can stand for; skips where there is
    none."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "own":
            kept, own = _OLDER[request.param], torch.cpu.get_capabilities()
            if not all(own.get(name) for name in kept):
                pytest.skip("this CPU is older")
            patch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(kept, True))
        forget_cpu()
        if not native.is_possible(32, [2]):
            pytest.skip("nothing is compiled for this CPU")
        yield
    forget_cpu()
