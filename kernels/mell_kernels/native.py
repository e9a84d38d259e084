"""Decoder layers of Llama's kind on a CPU, compiled: the sources are in ``kernels/native``.

Where they were compiled when this package was installed and the CPU can run them, a step of a
bfloat16 model is one call: between its products there is nothing but a barrier. Where not, nothing
here is used.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from mell_kernels.metadata import AttentionMetadata

logger = logging.getLogger(__name__)

_LAYOUT = 1  # that of kernels/native/model.h
_PIECE = 512  # keys of a decode that one thread serves
_LINE = 16  # floats of a cache line
_INPUTS = 32  # a row of them is filled up to a multiple of so many
_I64 = ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, _I64) for name in ("n", "k")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_1", "norm_2", "q_norm", "k_norm")),
        ("window", _I64),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "scale", "factor")),
        ("rotates", ctypes.c_int32),
        ("gelu", ctypes.c_int32),
    ]


_POINTERS = (
    *("x", "cosines", "sines", "slots", "starts", "lengths", "tables", "wanted", "pool"),
    *("qkv", "attended", "gated", "normed", "prepared", "scales", "partial"),
)
_NUMBERS = (
    *("tokens", "sequences", "table_width", "num_wanted"),
    *("hidden", "width", "heads", "kv_heads", "head_dim", "num_layers", "block_size"),
    *("x_stride", "qkv_stride", "attended_stride", "gated_stride", "prepared_stride"),
    *("piece", "splits", "next"),
)


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, _I64) for name in _NUMBERS),
    ]


@cache
def library() -> Any:
    """The compiled code for this CPU; None: there is none."""
    features = torch.cpu.get_capabilities()
    wide = all(features.get(f"avx512_{f}") for f in ("f", "bw", "vl", "dq"))
    names = ["_native_fp16"] if wide and features.get("avx512_fp16") else []
    names += ["_native_v4"] if wide else []
    names += ["_native_v3"] if features.get("avx2") and features.get("fma3") else []
    paths = [path for name in names for path in sorted(Path(__file__).parent.glob(f"{name}.*so"))]
    for path in paths:
        try:
            # Its threads are torch's: it leaves OpenMP to be found among what torch has loaded.
            found = ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("%s cannot be loaded: %s", path.name, error)
            continue
        if _layout_of(found) == _LAYOUT * 1_000_000 + _sizes():
            return found
        logger.warning("%s is of another version: install mell-ray again to compile it", path.name)
    return None


def _layout_of(found: Any) -> int | None:
    layout = getattr(found, "mell_layout", None)
    if layout is None:
        return None
    layout.restype = _I64
    return int(layout())


def _sizes() -> int:
    return ctypes.sizeof(_Layer) * 1000 + ctypes.sizeof(_Step)


def is_possible(head_dim: int, inputs: Sequence[int]) -> bool:
    """Whether layers with these heads, and matrices with so many ``inputs``, can be run so."""
    if library() is None:
        return False
    return head_dim % (2 * _lanes()) == 0 and head_dim <= 256 and all(k % 2 == 0 for k in inputs)


def _lanes() -> int:
    return int(library().mell_lanes())


@dataclass(slots=True)
class Packed:
    """A matrix as ``kernels/native`` reads it: in panels of outputs, for each panel input after
    input. Either pairs of bfloat16 as int32 ``[panels, K / 2, 2, lanes]``, or float16
    ``[panels, K up to a multiple of 32, outputs]``, which an output's scale multiplies."""

    weight: torch.Tensor
    scales: torch.Tensor | None  # float32, as many as outputs are packed
    bias: torch.Tensor | None  # float32, likewise
    n: int
    k: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias`` of float32 ``x``, ``[R, K]``."""
        y = torch.empty(len(x), self.n)
        prepared, scales = torch.empty(len(x), _prepared_stride(self.k)), torch.empty(len(x))
        library().mell_multiply(
            ctypes.byref(self.describe()),
            *(ctypes.c_void_p(x.data_ptr()), _I64(x.stride(0)), _I64(len(x))),
            *(ctypes.c_void_p(prepared.data_ptr()), _I64(prepared.stride(0))),
            ctypes.c_void_p(scales.data_ptr()),
            *(ctypes.c_void_p(y.data_ptr()), _I64(self.n)),
            torch.get_num_threads(),
        )
        return y

    def describe(self) -> _Matrix:
        addresses = map(_address, (self.weight, self.scales, self.bias))
        return _Matrix(*addresses, self.n, self.k)


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Packed:
    """``weight``: ``[N, K]`` bfloat16."""
    panel = int(library().mell_panel())
    return _packed(weight, bias, lambda rows: in_panels(rows, panel))


def pack_gated(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Packed:
    """``weight``: ``[2 * N, K]`` bfloat16, the gate's outputs first. They are packed by turns."""
    half = int(library().mell_panel()) // 2

    def by_turns(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([in_panels(part, half) for part in rows.chunk(2)], dim=1)

    return _packed(weight, bias, by_turns)


def _packed(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arranged: Callable[[torch.Tensor], torch.Tensor],
) -> Packed:
    """``arranged`` makes ``[panels, outputs, ...]`` of ``[N, ...]``."""
    n, k = weight.shape
    if bias is not None:
        bias = arranged(bias.float()).flatten()
    if not library().mell_halves():
        pairs = arranged(weight.contiguous().view(torch.int32))
        lanes = int(library().mell_lanes())
        pairs = pairs.unflatten(1, (2, lanes)).permute(0, 3, 1, 2).contiguous()
        return Packed(pairs, None, bias, n, k)
    # Powers of two, at which the largest weight of an output lies from 16 to 32.
    largest = weight.abs().amax(1).float()
    scales = torch.exp2(torch.frexp(largest).exponent.float() - 5).clamp_(2.0**-100, 2.0**100)
    halves = pad(weight, (0, -k % _INPUTS))
    panels = arranged(halves)
    divisors = arranged(scales)
    packed = torch.empty(len(panels), panels.shape[2], panels.shape[1], dtype=torch.float16)
    for panel, divisor, to in zip(panels, divisors, packed, strict=True):
        to.copy_((panel.float() / divisor.clamp_min(2.0**-100)[:, None]).T)
    return Packed(packed, divisors.flatten(), bias, n, k)


def in_panels(rows: torch.Tensor, size: int) -> torch.Tensor:
    """``[N, ...]`` as ``[panels, size, ...]``, filled up with zeros."""
    missing = -len(rows) % size
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.unflatten(0, (-1, size))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _odd_lines(size: int) -> int:
    """A stride for rows of ``size`` floats at which some of them lie in different sets of a
    cache."""
    return (-(-size // _LINE) | 1) * _LINE


def _prepared_stride(inputs: int) -> int:
    return _odd_lines(-(-inputs // _INPUTS) * _INPUTS)


@dataclass(slots=True)
class LayerWeights:
    """A decoder layer of Llama's kind. Gains are those of RMSNorm, float32."""

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    norm_1: torch.Tensor
    norm_2: torch.Tensor
    eps: float
    scale: float  # of scores
    q_norm: torch.Tensor | None = None  # over a head's dimensions
    k_norm: torch.Tensor | None = None
    qk_eps: float = 0.0
    window: int | None = None
    factor: float = 1.0  # of what is added to the residual stream
    rotates: bool = True
    gelu: bool = False  # in place of SiLU: the approximation by tanh

    def describe(self) -> _Layer:
        return _Layer(
            *(matrix.describe() for matrix in (self.qkv, self.out, self.gate_up, self.down)),
            *map(_address, (self.norm_1, self.norm_2, self.q_norm, self.k_norm)),
            self.window or 0,
            *(self.eps, self.qk_eps, self.scale, self.factor),
            *(self.rotates, self.gelu),
        )


class Layers:
    """All layers of a model."""

    def __init__(self, weights: Sequence[LayerWeights], heads: int, kv_heads: int) -> None:
        self._weights = list(weights)
        self._heads, self._kv_heads = heads, kv_heads
        first = self._weights[0]
        self._hidden, self._width = first.out.n, first.down.k
        self._head_dim = first.out.k // heads
        self._describe()

    def _describe(self) -> None:
        self._layers = (_Layer * len(self._weights))(*(w.describe() for w in self._weights))
        self._step = _Step(
            hidden=self._hidden,
            width=self._width,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            num_layers=len(self._weights),
            piece=_PIECE,
        )
        self._sizes = {
            "qkv": (self._heads + 2 * self._kv_heads) * self._head_dim,
            "attended": self._heads * self._head_dim,
            "gated": self._width,
        }
        inputs = (self._hidden, self._heads * self._head_dim, self._width)
        self._sizes["prepared"] = _prepared_stride(max(inputs))
        self._room, self._room_for = torch.empty(0), (0, 0)
        self._rows: dict[str, torch.Tensor] = {}

    def matrices(self) -> list[Packed]:
        return [
            matrix
            for each in self._weights
            for matrix in (each.qkv, each.out, each.gate_up, each.down)
        ]

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_layers", "_step", "_room", "_room_for", "_rows", "_scales", "_normed")
        return {name: value for name, value in self.__dict__.items() if name not in skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._describe()

    def suits(self, pool: Any) -> bool:
        """Whether ``run`` reads and writes such a pool."""
        return (
            isinstance(pool, torch.Tensor)
            and pool.dtype == torch.bfloat16
            and pool.device.type == "cpu"
            and pool.is_contiguous()
            and pool.shape[1:3] == (len(self._weights), 2)
            and pool.shape[4:] == (self._kv_heads, self._head_dim)
        )

    def run(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        pool: torch.Tensor,
        meta: AttentionMetadata,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """The residual stream ``x``, ``[T, hidden]`` float32, after all layers: its rows
        ``wanted``, which rise. Keys and values of ``meta``'s tokens are written to ``pool``.

        Args:
            cosines: of the tokens' rotary angles, ``[T, head_dim]``; ``sines`` are negated in the
                first half.
        """
        step = self._begin(x, cosines, sines, wanted)
        step.slots, step.pool = meta.slot_mapping.data_ptr(), pool.data_ptr()
        step.starts, step.lengths = meta.cu_seqlens_q.data_ptr(), meta.seq_lens.data_ptr()
        step.tables, step.table_width = meta.block_tables.data_ptr(), meta.block_tables.shape[1]
        step.sequences, step.block_size = len(meta.seq_lens), pool.shape[3]
        step.splits = meta.max_seqlen_k > _PIECE
        if step.splits:
            pieces = int(((meta.seq_lens + _PIECE - 1) // _PIECE).sum())
            partial = torch.empty(pieces * self._heads * (self._head_dim + 2))
            step.partial = partial.data_ptr()
        library().mell_layers(self._layers, ctypes.byref(step), torch.get_num_threads())
        return x[: len(wanted)]

    def run_around(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        attend: Callable[..., torch.Tensor],
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """``run``, with another's attention: ``attend(layer, query, key, value, scale=, window=,
        softcap=None, sinks=None)`` of bfloat16 ``[T, heads, head_dim]`` each."""
        step = self._begin(x, cosines, sines, wanted)
        step.pool, call = None, (self._layers, ctypes.byref(step), torch.get_num_threads())
        heads = -1, self._head_dim
        joined, attended = self._rows["qkv"], self._rows["attended"]
        counts = (self._heads, self._kv_heads, self._kv_heads)
        for index, layer in enumerate(self._weights):
            library().mell_before_attention(_I64(index), *call)
            parts = joined.bfloat16().unflatten(1, heads).split(counts, dim=1)
            how = {"scale": layer.scale, "window": layer.window, "softcap": None, "sinks": None}
            attended.copy_(attend(index, *parts, **how).flatten(1))
            library().mell_after_attention(_I64(index), *call)
        return x[: len(wanted)]

    def _begin(
        self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, wanted: torch.Tensor
    ) -> _Step:
        step, tokens = self._step, len(x)
        step.next = 0
        step.tokens, step.num_wanted = tokens, len(wanted)
        step.x, step.x_stride = x.data_ptr(), x.stride(0)
        step.cosines, step.sines = cosines.data_ptr(), sines.data_ptr()
        step.wanted = wanted.data_ptr()
        self._make_room(tokens)
        for name, rows in self._rows.items():
            setattr(step, name, rows.data_ptr())
            setattr(step, f"{name}_stride", rows.stride(0))
        return step

    def _make_room(self, tokens: int) -> None:
        """Scratch memory outlives the steps: fresh pages cost more than what is done in them."""
        threads = torch.get_num_threads()
        if (tokens, threads) == self._room_for:
            return
        strides = [_odd_lines(size) for size in self._sizes.values()]
        if self._room.numel() < tokens * sum(strides):
            self._room = torch.empty(tokens * sum(strides))
        self._scales = torch.empty(tokens)
        self._normed = torch.empty(threads, self._hidden)
        self._step.scales, self._step.normed = map(_address, (self._scales, self._normed))
        parts = self._room[: tokens * sum(strides)].split([tokens * each for each in strides])
        for (name, size), part in zip(self._sizes.items(), parts, strict=True):
            self._rows[name] = part.view(tokens, -1)[:, :size]
        self._room_for = tokens, threads
