"""The largest of many outputs of a linear layer, of which most are never computed exactly.

Where a token is chosen greedily, only the largest logit counts, and the layer that gives the logits
is the largest matrix of a small model. Its product in int8 takes a fraction of the time (a quarter
and less with AVX512-VNNI), and how far an output of it can be from the exact one is known: what
rounding took from the row and from the weights, times their lengths. Outputs that cannot be the
largest even so are left out; the few others, usually some dozens of tens of thousands, are computed
in float32. The choice is that of the exact outputs, never an approximate one.
"""

from __future__ import annotations

import numpy as np
import torch

from mell_kernels.linear import padded_rows

_SMALLEST = 1 << 22  # weights from which on two products take less time than one
_CHUNK = 4096  # rows of weights that are rounded at a time, which bounds the memory in between
_BF16_AT = 16  # the bit of a float32 at which its bfloat16 begins
ZERO = 128  # the code of zero: oneDNN's fast product wants unsigned inputs
# bfloat16 keeps an output to within 2**-9 of it; so much of the largest is more than twice that.
_OUTPUT_ROUNDING = 2.0**-6
_FLOAT_ROUNDING = 1.001  # of the bounds themselves
_MOST_LEFT = 1 / 128  # of all outputs: beyond it, the product itself is cheaper
_PAUSE = 64  # calls without a try after one that was in vain


def is_possible(weight: torch.Tensor) -> bool:
    """Whether a ``Screen`` of ``weight`` saves time here."""
    features = torch.cpu.get_capabilities()
    return (
        weight.device.type == "cpu"
        and weight.numel() >= _SMALLEST
        and torch.backends.mkldnn.is_available()
        and bool(features.get("avx512_vnni"))  # without it, sums of int8 products saturate
    )


def nbytes(weight: torch.Tensor) -> int:
    """What a ``Screen`` takes besides ``weight``."""
    return weight.numel()


def encoded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Int8 codes of ``[V, K]`` weights, and for each row what multiplies its codes, its length, and
    the length of what rounding took from it."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    lengths, losts = torch.empty(len(weight)), torch.empty(len(weight))
    for start in range(0, len(weight), _CHUNK):
        rows = slice(start, start + _CHUNK)
        wide = weight[rows].float()
        scale = wide.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny * 127) / 127
        rounded = (wide / scale[:, None]).round_()
        codes[rows], scales[rows] = rounded.to(torch.int8), scale
        lost = wide - rounded.mul_(scale[:, None])
        lengths[rows] = torch.linalg.vector_norm(wide, dim=1)
        losts[rows] = torch.linalg.vector_norm(lost, dim=1)
    return codes, scales, lengths, losts


class Screen:
    """Of a layer without bias; keeps ``weight``, ``[V, K]``, and one more byte for each of it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        codes, scales, lengths, losts = encoded(weight)
        # Of the longest row, and of what rounding changed in the row it changed most.
        self._length, self._lost = float(lengths.max()), float(losts.max())
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._pause = 0

    def likeliest(self, x: torch.Tensor) -> torch.Tensor | None:
        """The index of the largest output of each row of ``x``, ``[R, K]`` float32: ``[R]`` int64,
        the lowest of equals. None where too many outputs might be the largest, or a row is not
        finite: the layer itself must tell."""
        if self._pause:
            self._pause -= 1
            return None
        left = self._left(x.numpy())
        if left is None:
            self._pause = _PAUSE
            return None
        rows, ids = left
        columns = torch.from_numpy(ids)
        candidates = self._weight.index_select(0, columns).float()
        candidates *= x.index_select(0, torch.from_numpy(rows))
        outputs = candidates.sum(1).numpy()
        if not np.isfinite(outputs).all():
            return None
        # Rows and, within them, ids are in rising order.
        starts = np.searchsorted(rows, np.arange(len(x)))
        best = np.flatnonzero(outputs == np.maximum.reduceat(outputs, starts)[rows])
        result = np.full(len(x), -1)
        result[rows[best[::-1]]] = ids[best[::-1]]
        return torch.from_numpy(result)

    def _left(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Row and index of all outputs that may be the largest of their row."""
        largest = np.abs(x).max(1, keepdims=True)
        if not (np.isfinite(largest).all() and (largest > np.finfo(np.float32).tiny * 127).all()):
            return None
        # A row's scale moves no output past another: all below is in units of it.
        scaled = x * (127 / largest)
        rounded = np.rint(scaled)
        lost, length = np.linalg.norm(scaled - rounded, axis=1), np.linalg.norm(rounded, axis=1)
        reach = (lost * self._length + length * self._lost) * _FLOAT_ROUNDING
        codes = np.full((padded_rows(len(x)), x.shape[1]), ZERO, dtype=np.uint8)
        codes[: len(x)] = rounded + ZERO
        bits = self._product(torch.from_numpy(codes))[: len(x)].view(torch.int16).numpy()
        # The order of positive floats is that of their bits.
        highest = (bits.max(1).astype(np.int32) << _BF16_AT).view(np.float32)
        bound = highest - 2 * reach - (np.abs(highest) + reach) * _OUTPUT_ROUNDING
        if not (bound > 0).all():
            return None
        lowest = (bound.view(np.int32) >> _BF16_AT).astype(np.int16)
        flat = np.flatnonzero(bits >= lowest[:, None])
        if len(flat) > bits.size * _MOST_LEFT:
            return None
        return np.divmod(flat, bits.shape[1])

    def _product(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise.default(
            codes,
            1.0,
            ZERO,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )

    def compile(self, rows: int) -> None:
        """Have the product of ``rows`` rows compiled now."""
        self._product(torch.zeros((padded_rows(rows), self._weight.shape[1]), dtype=torch.uint8))
