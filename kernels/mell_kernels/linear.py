"""Linear layers of a CPU whose weights were laid out once for its matrix kernels.

A plain linear layer hands its weight matrix over as it is, and the library re-arranges it on each
call: with the few rows of a decode step that costs as much as the multiplication.

A CPU with AVX512-BF16 but without AMX has half the speed of float32 in bfloat16. There a bfloat16
layer may keep copies in float16, which holds every such weight to within 2**-25: one for few rows
(``narrow``), and, where the CPU has AVX512-FP16 and no input can leave float16's range, one for
many. All sum in float32. Each copy takes two bytes per weight; who makes them sees to the memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from mell_kernels import narrow

# oneDNN, and torch around it, each keep what they compile for every number of rows and every shape,
# 1024 of them unless told otherwise, which adds up to half a GiB. They ask the environment when
# they are first used.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "512")
# The layout is chosen for about this many rows; measured good from one row to a full prefill.
_PACKED_FOR_ROWS = 32
_HALF_FROM_ROWS = 9
NARROW_UP_TO_ROWS = 32
_HALF_LARGEST = 60_000.0
# A layer whose outputs may be larger has its weights divided by a power of two, up to this one:
# beyond it, weights would be lost below float16's smallest.
_MOST_SHRUNK = 64.0


@dataclass(frozen=True, slots=True)
class Bound:
    """What no row of inputs can exceed."""

    norm: float  # Euclidean, of the row
    largest: float  # of an element, in absolute value


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix kernels for packed weights of ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    features = torch.cpu.get_capabilities()
    if dtype == torch.float32:
        return bool(features.get("avx2"))
    if dtype == torch.bfloat16:
        return all(features.get(f) for f in ("avx512_bw", "avx512_vl", "avx512_dq"))
    return False


def half_is_faster() -> bool:
    """Whether float16 beats bfloat16 here."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_fp16")) and not features.get("amx_bf16")


if torch.backends.mkldnn.is_available():  # looked up once, as that costs as much as a small call
    _multiply = torch.ops.mkldnn._linear_pointwise.default
    _multiply_add = torch.ops.mkldnn._linear_pointwise.binary


def fits_half(largest: float) -> bool:
    """Whether numbers up to that one stay well inside float16's range."""
    return largest <= _HALF_LARGEST


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)


def padded_rows(rows: int) -> int:
    """The next number of rows that is worth a product of its own: compiling one takes 0.5 ms for
    each shape, and keeps half a MiB. Up to 32 rows there are four sizes between powers of two, from
    there on eight: what is added is 4 % on average."""
    step = 1 << max(0, (rows - 1).bit_length() - (4 if rows > 32 else 3))
    return -(-rows // step) * step


class Linear:
    """``x @ weight.T + bias`` for 2-D ``x``. Keeps its own copy of ``weight``, packed if possible.

    The result of a row may differ in the last bits with the number of rows, as that of any matrix
    library does.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        bound: Bound | None = None,
        may_shrink: bool = False,
    ) -> None:
        """
        Args:
            bound: of all inputs, for a copy in float16 where that is faster; None: no copy.
            may_shrink: whether results come from ``plus`` alone, which can undo a division.
        """
        self._dtype = weight.dtype
        self._bias = bias
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self._half: torch.Tensor | None = None
        self._half_bias: torch.Tensor | None = None
        self._shrunk = 1.0
        self._narrow: Any = None
        if weight.device.type == "cpu" and can_pack(weight.dtype):
            self._packed = _pack(weight)
            if bound is not None and weight.dtype == torch.bfloat16 and half_is_faster():
                self._keep_half(weight, bound, _MOST_SHRUNK if may_shrink else 1.0)
        else:
            self._weight = weight

    def _keep_half(self, weight: torch.Tensor, bound: Bound, most_shrunk: float) -> None:
        needed = max(1.0, largest_output(weight, self._bias, bound) / _HALF_LARGEST)
        shrunk = 2.0 ** math.ceil(math.log2(needed))
        if fits_half(bound.largest) and shrunk <= most_shrunk:
            self._shrunk = shrunk
            self._half = _pack((weight.float() / shrunk).half())
            self._half_bias = None if self._bias is None else (self._bias.float() / shrunk).half()

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy for few rows, whose memory nobody can share or describe."""
        return {**self.__dict__, "_narrow": None}

    def plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias as they were given."""
        weight = self._weight if self._packed is None else self._packed.to_dense()
        assert weight is not None
        return weight, self._bias

    def keep_narrow(self, packed: Any) -> None:
        """Use a copy for few rows from now on, which ``narrow.pack`` has made."""
        self._narrow = packed

    def is_compiled(self, rows: int) -> bool:
        """Whether a product of ``rows`` rows is compiled for that number and kept."""
        return self._packed is not None and not self._is_narrow(rows)

    def suited_rows(self, rows: int) -> int:
        """To how many rows an input of ``rows`` rows is to be filled up."""
        return padded_rows(rows) if self.is_compiled(rows) else rows

    def _is_narrow(self, rows: int) -> bool:
        return self._narrow is not None and rows <= NARROW_UP_TO_ROWS

    def input_dtype(self, rows: int) -> torch.dtype:
        """In which dtype ``rows`` rows of input are multiplied fastest."""
        if self._is_narrow(rows):
            return torch.float32
        return torch.float16 if self._half is not None and rows >= _HALF_FROM_ROWS else self._dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is of the weight's dtype or of ``input_dtype``, and so is the result."""
        if self._narrow is not None and x.dtype == torch.float32:
            return narrow.multiply(x, self._narrow)
        if self._weight is not None:
            return linear(x, self._weight, self._bias)
        if x.dtype == torch.float16:
            return _multiply(x, self._half, self._half_bias, "none", [], "")
        return _multiply(x, self._packed, self._bias, "none", [], "")

    def plus(self, x: torch.Tensor, residual: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """``residual + factor * self(x)``, of the residual's dtype and perhaps in its memory."""
        fits = factor == 1.0 and x.dtype == residual.dtype == self._dtype
        if self._packed is not None and fits:
            return _multiply_add(x, residual, self._packed, self._bias, "add")
        shrunk = self._shrunk if x.dtype == torch.float16 else 1.0
        return residual.add_(self(x), alpha=factor * shrunk)


def add_narrow(linears: Sequence[Linear]) -> None:
    """Give each a copy for few rows, if float16 can hold its weights. Each core packs a matrix at a
    time; more at once would be more memory than the copies are."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(linears), threads):
            packing = []
            for linear in linears[start : start + threads]:
                weight, bias = linear.plain()
                if narrow.fits(weight):
                    packing.append((linear, pool.submit(narrow.pack, weight.float(), bias)))
            for linear, packed in packing:
                linear.keep_narrow(packed.result())


def largest_output(weight: torch.Tensor, bias: torch.Tensor | None, bound: Bound) -> float:
    """What no output of ``x @ weight.T + bias`` can exceed for ``x`` within ``bound``."""
    most = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) * bound.norm
    if bias is not None:
        most += bias.float().abs()
    return float(most.max())
