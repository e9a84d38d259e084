"""Random decoder layers of Llama's kind on random paged KV, and what they compute, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from mell_kernels import native
from mell_kernels.metadata import AttentionMetadata

from tests.kernels.cases import metadata

# Of |x| * |w|, for y = x . w: to round inputs to float16 costs 2^-11 of it at most, and sums of
# some products in float16 about as much again, if not all of them err to the same side.
PRODUCT = 2e-3

# Larger than any model's, else leaving them out would not be seen.
EPS, QK_EPS = 0.2, 0.7
SPLIT = 512  # keys; beyond, a decode may be served in pieces
_GUARD = 4096  # elements around what may be written


@dataclass(frozen=True, slots=True)
class Case:
    """``lengths``: (tokens with KV already, new tokens) of each sequence."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    hidden: int = 48
    width: int = 40
    layers: int = 2
    block_size: int = 4
    window: int | None = None
    alternates: bool = False  # every second layer: no window, no rotation
    qk_norm: bool = False
    rotates: bool = True
    factor: float = 1.0
    gelu: bool = False
    biased: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        return 1.3 * self.dim**-0.5

    def window_of(self, layer: int) -> int | None:
        return None if self.alternates and layer % 2 else self.window

    def is_rotated(self, layer: int) -> bool:
        return self.rotates and not (self.alternates and layer % 2)


@dataclass(slots=True)
class Plain:
    """A layer's parameters: (weight, bias) of its matrices, bfloat16; gains, float32."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    gains: dict[str, torch.Tensor]

    def apply(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.matrices[name]
        return torch.nn.functional.linear(
            x, weight.double(), None if bias is None else bias.double()
        )


def plain_layers(case: Case) -> list[Plain]:
    generator = torch.Generator().manual_seed(case.seed)

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.randn(n, k, generator=generator) * k**-0.5
        bias = torch.randn(n, generator=generator).bfloat16() if case.biased else None
        return weight.bfloat16(), bias

    def layer() -> Plain:
        inner = case.heads * case.dim
        sizes = {"norm_1": case.hidden, "norm_2": case.hidden}
        if case.qk_norm:
            sizes |= {"q_norm": case.dim, "k_norm": case.dim}
        return Plain(
            {
                "qkv": matrix(inner + 2 * case.kv_heads * case.dim, case.hidden),
                "out": matrix(case.hidden, inner),
                "gate_up": matrix(2 * case.width, case.hidden),
                "down": matrix(case.hidden, case.width),
            },
            {
                name: 1 + 0.3 * torch.randn(size, generator=generator)
                for name, size in sizes.items()
            },
        )

    return [layer() for _ in range(case.layers)]


def native_layers(case: Case, plain: list[Plain]) -> native.Layers:
    return native.Layers(
        [
            native.LayerWeights(
                native.pack(*layer.matrices["qkv"]),
                native.pack(*layer.matrices["out"]),
                native.pack_gated(*layer.matrices["gate_up"]),
                native.pack(*layer.matrices["down"]),
                **layer.gains,
                eps=EPS,
                qk_eps=QK_EPS if case.qk_norm else 0.0,
                scale=case.scale,
                window=case.window_of(i),
                factor=case.factor,
                rotates=case.is_rotated(i),
                gelu=case.gelu,
            )
            for i, layer in enumerate(plain)
        ],
        case.heads,
        case.kv_heads,
    )


class Batch:
    """Everything but the keys and values that the batch's sequences have already is NaN in
    ``pool``, and must reach nobody. ``memory`` is what the pool lies in."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed + 1)
        blocks = 3 + sum(-(-(old + new) // case.block_size) for old, new in case.lengths)
        self.meta: AttentionMetadata = metadata(case.lengths, case.block_size, blocks, case.seed)
        shape = (blocks, case.layers, 2, case.block_size, case.kv_heads, case.dim)
        size = torch.Size(shape).numel()
        self.memory = torch.full((size + 2 * _GUARD,), torch.nan, dtype=torch.bfloat16)
        self.pool = self.memory[_GUARD:-_GUARD].view(shape)
        for sequence, (old, new) in enumerate(case.lengths):
            kv = torch.randn(case.layers, 2, old, *shape[4:], generator=generator)
            for position, loudness in _loud(case, old, new).items():
                kv[:, 1, position] *= loudness
            index, offset = self.places(sequence, old)
            self.pool[index, :, :, offset] = kv.movedim(2, 0).bfloat16()
        self.positions = torch.cat([torch.arange(old, old + new) for old, new in case.lengths])
        tokens = len(self.positions)
        self.x = 2 * torch.randn(tokens, case.hidden, generator=generator)
        self.wanted = torch.arange(tokens)
        self.turns = torch.outer(self.positions, 100.0 ** -torch.linspace(0, 1, case.dim // 2))
        cos, sin = self.turns.cos(), self.turns.sin()
        self.angles = torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)

    def places(self, sequence: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of a sequence's first ``count`` tokens."""
        positions, block_size = torch.arange(count), self.pool.shape[3]
        return self.meta.block_tables[sequence, positions // block_size], positions % block_size

    @property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of the batch's tokens."""
        slots, block_size = self.meta.slot_mapping, self.pool.shape[3]
        return slots // block_size, slots % block_size

    def written(self, layer: int) -> torch.Tensor:
        """Keys and values of the batch's tokens in the pool, ``[2, T, Hk, D]``."""
        index, offset = self.slots
        return self.pool[index, layer, :, offset].transpose(0, 1)

    def read(self, layer: int, sequence: int) -> torch.Tensor:
        """Keys and values of a sequence, ``[2, keys, Hk, D]`` float64."""
        index, offset = self.places(sequence, int(self.meta.seq_lens[sequence]))
        return self.pool[index, layer, :, offset].transpose(0, 1).double()


def _loud(case: Case, old: int, new: int) -> dict[int, float]:
    """What to multiply values of a decode with where it would else not be seen whether one is
    left out, or let in: at the edges of pieces, and of a window."""
    first = max(0, old + 1 - case.window) if case.window else 0
    if new != 1 or old < SPLIT:
        return {}
    edges = {first - 1: 3000.0, first: 30.0, old - 1: 30.0}
    for piece in range(first + SPLIT, old, SPLIT):
        edges |= {piece - 1: 30.0, piece: -30.0}
    return {position: by for position, by in edges.items() if 0 <= position < old}


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expected(case: Case, plain: list[Plain], batch: Batch, attend: Attend) -> torch.Tensor:
    """The residual stream after all layers, ``[T, hidden]``. ``attend(layer, query, key, value)``
    of ``[T, heads, D]`` each."""
    x = batch.x.double()
    counts = (case.heads, case.kv_heads, case.kv_heads)
    for index, layer in enumerate(plain):
        qkv = layer.apply("qkv", normed(x, layer.gains["norm_1"], EPS))
        query, key, value = qkv.unflatten(1, (-1, case.dim)).split(counts, dim=1)
        if case.qk_norm:
            query = normed(query, layer.gains["q_norm"], QK_EPS)
            key = normed(key, layer.gains["k_norm"], QK_EPS)
        if case.is_rotated(index):
            query, key = turned(query, batch.turns), turned(key, batch.turns)
        attended = attend(index, query, key, value).flatten(1)
        x = x + case.factor * layer.apply("out", attended)
        gate, up = layer.apply("gate_up", normed(x, layer.gains["norm_2"], EPS)).chunk(2, dim=1)
        if case.gelu:
            gated = torch.nn.functional.gelu(gate, approximate="tanh") * up
        else:
            gated = torch.nn.functional.silu(gate) * up
        x = x + case.factor * layer.apply("down", gated)
    return x


def normed(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Dimension i and that half a head further, as a complex number, by ``turns[:, i]``."""
    real, imaginary = x.chunk(2, dim=-1)
    turn = torch.polar(torch.ones_like(turns), turns).to(torch.complex128)[:, None]
    y = torch.complex(real, imaginary) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def attention(case: Case, batch: Batch, layer: int, query: torch.Tensor) -> torch.Tensor:
    """Of ``query``, over what the pool has."""
    made = []
    starts = batch.meta.cu_seqlens_q.tolist()
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        key, value = batch.read(layer, sequence).repeat_interleave(case.heads // case.kv_heads, 2)
        scores = torch.einsum("qhd,khd->hqk", query[start:stop].double(), key) * case.scale
        behind = batch.positions[start:stop, None] - torch.arange(len(key))
        hidden = behind < 0
        window = case.window_of(layer)
        if window is not None:
            hidden |= behind >= window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        made.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(made) if made else query[:0]


def forget_cpu() -> None:
    """What ``native`` has found out about the CPU, and what is compiled for it."""
    for each in vars(native).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
