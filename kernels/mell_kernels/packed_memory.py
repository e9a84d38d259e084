"""Packed matrices (``linear``) in memory that somebody else owns.

A packed matrix is opaque to torch: it has no storage that could be shared. But oneDNN can be told
to find one at an address, which is how several processes run from one copy. torch does so for its
compiled models, from C++ only; here the same function is called by its exported name. The name
says the types of the parameters, so where it is found it is the right one; what it returns is
written down for one version of torch, and everything else is refused.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_TORCH = "2.13."
_NAME = (
    "_ZN2at6native27mkldnn_tensor_from_data_ptr"
    "EPvN3c108ArrayRefIlEENS2_10ScalarTypeENS2_6DeviceEPKhl"
)
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType
_CPU = 0  # c10::Device: type in the low byte, index in the high one


def is_packed(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch._mkldnn  # type: ignore[attr-defined]


def can_adopt() -> bool:
    """Whether ``adopt`` works here."""
    return _function() is not None


def extent(packed: torch.Tensor) -> tuple[int, int]:
    """Address and number of a packed matrix's bytes."""
    return torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)


def description(packed: torch.Tensor) -> bytes:
    """What its bytes mean, to this version of torch on this machine."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()


def adopt(
    memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, described: bytes
) -> torch.Tensor:
    """The packed matrix whose bytes lie in ``memory``, not copied, and kept alive with it.

    Raises:
        RuntimeError: not on this machine, see ``can_adopt``.
    """
    function = _function()
    if function is None:
        raise RuntimeError(f"packed matrices cannot share memory with torch {torch.__version__}")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    # The C++ function returns a tensor into a cell that the caller provides. Python takes tensors
    # over from cells on the C++ heap alone, so the new one changes places with one that lies there.
    made = ctypes.c_void_p()
    function(
        ctypes.addressof(made),
        memory.data_ptr(),
        ctypes.addressof(sizes),
        len(shape),
        _SCALAR_TYPES[dtype],
        _CPU,
        described,
        len(described),
    )
    cells = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([_spare()])
    cell = ctypes.c_void_p.from_address(_address(cells[0]))
    cell.value = made.value  # the spare tensor keeps one reference too many, and is never freed
    packed = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(cells)[0]
    packed.__dict__["memory"] = memory
    return packed


@cache
def _spare() -> torch.Tensor:
    return torch.empty(0)


def _address(capsule: Any) -> int:
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer(capsule, name(capsule))


@cache
def _function() -> Any:
    known = sys.platform == "linux" and platform.machine() == "x86_64"
    if not known or not torch.__version__.startswith(_TORCH):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library[_NAME]
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_void_p
    function.argtypes = [
        ctypes.c_void_p,  # where the returned tensor goes
        ctypes.c_void_p,  # data
        ctypes.c_void_p,  # sizes: first
        ctypes.c_int64,  # sizes: count
        ctypes.c_int8,
        ctypes.c_int16,
        ctypes.c_char_p,
        ctypes.c_int64,
    ]
    return function
