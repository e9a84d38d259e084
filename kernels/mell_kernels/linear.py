"""Linear layers of a CPU whose weights were laid out once for its matrix kernels.

A plain linear layer hands its weight matrix over as it is, and the library re-arranges it on each
call: with the few rows of a decode step that costs as much as the multiplication.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

# The layout is chosen for about this many rows; measured good from one row to a full prefill.
_PACKED_FOR_ROWS = 32


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


class Linear:
    """``x @ weight.T + bias`` for 2-D ``x``. Keeps its own copy of ``weight``, packed if possible.

    The result of a row may differ in the last bits with the number of rows, as that of any matrix
    library does.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        if weight.device.type == "cpu" and can_pack(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(
                weight.contiguous(), _PACKED_FOR_ROWS
            )
        else:
            self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight is not None:
            return linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``residual + self(x)`` in one pass over the result."""
        if self._weight is not None:
            return linear(x, self._weight, self._bias).add_(residual)
        return torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._packed, self._bias, "add"
        )
