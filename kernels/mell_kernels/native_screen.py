"""The screen of logits (``screen``) in compiled code, which bounds each output on its own."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from mell_kernels import screen
from mell_kernels.native import Packed, in_panels, library

_GROUP = 16  # outputs that are computed again together
_PANEL, _CODES = 32, 4  # outputs whose codes lie together, and how many of each by turns
_MOST_COMPUTED = 1 / 16  # of all groups: beyond it, the product itself is cheaper
_PAUSE = 64  # calls without a try after one that was in vain
_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Screen(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("codes", "offsets", "scales", "lengths", "losses")]


class _Rows(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("normed", "codes", "losts", "lengths", "uppers", "lowers", "best", "ids")
        ),
        *((name, _I64) for name in ("count", "stride", "filled", "groups")),
    ]


def is_possible(weight: torch.Tensor) -> bool:
    """Whether a ``NativeScreen`` of ``weight`` can be made and saves time here."""
    return (
        screen.is_possible(weight)
        and hasattr(library(), "mell_likeliest")
        and bool(weight.isfinite().all())
    )


@dataclass(slots=True)
class NativeScreen:
    """Of a layer without bias: one byte for each of its weights."""

    codes: torch.Tensor  # int8 [panels, K / 4, 32, 4]
    offsets: torch.Tensor  # int32 [V filled up], as the others
    scales: torch.Tensor  # float32
    lengths: torch.Tensor
    losses: torch.Tensor
    inputs: int  # K filled up
    pause: int = 0

    @classmethod
    def of(cls, weight: torch.Tensor) -> NativeScreen:
        codes, scales, lengths, losses = screen.encoded(weight)
        offsets = codes.sum(1, dtype=torch.int32).mul_(screen.ZERO)
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _CODES))
        panels = in_panels(codes, _PANEL).unflatten(2, (-1, _CODES)).transpose(1, 2)
        offsets, scales, lengths, losses = (
            in_panels(each, _PANEL).flatten() for each in (offsets, scales, lengths, losses)
        )
        return cls(panels.contiguous(), offsets, scales, lengths, losses, codes.shape[1])

    def likeliest(
        self, x: torch.Tensor, gain: torch.Tensor, eps: float, head: Packed
    ) -> torch.Tensor | None:
        """The index of the largest output of ``head``, whose screen this is, for each row of ``x``,
        ``[R, K]`` float32, normalised by RMSNorm with ``gain``: ``[R]`` int64, the lowest of
        equals, -1 for a row that is not finite. None: not tried, after many that might have been
        the largest."""
        if self.pause:
            self.pause -= 1
            return None
        threads, count, groups = torch.get_num_threads(), len(x), -(-head.n // _GROUP)
        stride = -(-head.k // _GROUP) * _GROUP
        floats = torch.empty(count * (stride + 2 + groups + 2 * threads))
        sizes = [count * each for each in (stride, 1, 1, groups, threads, threads)]
        normed, losts, lengths, uppers, lowers, best = floats.split(sizes)
        codes = torch.empty(count, self.inputs, dtype=torch.uint8)
        ids = torch.empty(threads, count, dtype=torch.int64)
        order = (normed, codes, losts, lengths, uppers, lowers, best, ids)
        addresses = [each.data_ptr() for each in order]
        rows = _Rows(*addresses, count, stride, self.inputs, groups)
        parts = (self.codes, self.offsets, self.scales, self.lengths, self.losses)
        described = _Screen(*(each.data_ptr() for each in parts))
        matrix = head.describe()
        likeliest: Any = library().mell_likeliest
        likeliest.restype = _I64
        computed = likeliest(
            *(ctypes.byref(described), ctypes.byref(matrix)),
            *(_POINTER(x.data_ptr()), _I64(x.stride(0))),
            *(_POINTER(gain.data_ptr()), ctypes.c_float(eps)),
            *(ctypes.byref(rows), threads),
        )
        if computed > _MOST_COMPUTED * count * groups:
            self.pause = _PAUSE
        return ids[0]
