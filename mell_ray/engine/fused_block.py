"""One layer of Llama's block on a CPU; see ``fused``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from mell_kernels.linear import Bound, Linear, fits_half, largest_output
from torch.nn.functional import pad, silu


class Norm:
    """RMSNorm over the last dimension, computed in float32: fewer and faster operations than
    torch's own, which on a CPU is made of eight."""

    def __init__(self, module: Any) -> None:
        gemma = not hasattr(module, "variance_epsilon")
        self.weight = module.weight.float() + 1.0 if gemma else module.weight.float()
        self.eps = float(module.eps if gemma else module.variance_epsilon)
        self._eps = self.weight.new_tensor(self.eps)
        self._share = 1.0 / len(self.weight)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.float()
        norm = torch.linalg.vector_norm(x, 2, -1, True)
        scale = torch.addcmul(self._eps, norm, norm, value=self._share).rsqrt_()
        return (x * scale).mul_(self.weight).to(dtype)

    def bound(self) -> Bound:
        """Of what it gives: its rows lie on a sphere that ``weight`` stretches."""
        most = float(self.weight.abs().max()) * len(self.weight) ** 0.5
        return Bound(most, most)


class Rotary:
    """Cosines and signed sines by position, ``[positions, 1, 2, D / 2]`` each; grows on demand."""

    def __init__(self, module: torch.nn.Module, like: torch.Tensor) -> None:
        self._module = module
        self._like = like
        self._cos = self._sin = like.new_empty(0)

    def rows(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At ``positions``, all of which are below ``end``."""
        if end > len(self._cos):
            self._fill(max(1024, 1 << (end - 1).bit_length()))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _fill(self, length: int) -> None:
        positions = torch.arange(length, device=self._like.device)[None]
        cos, sin = self._module(self._like, position_ids=positions)
        half = cos.shape[-1] // 2
        self._cos = cos[0][:, None]
        # rotate_half(x) * sin == swapped halves of x * (-sin, sin)
        self._sin = sin[0][:, None].clone()
        self._sin[..., :half].neg_()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[T, heads, D]`` rotated by tables of ``[T, 1, D]``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Layer:
    """One decoder layer; takes the weights of its four matrices out of ``module``."""

    def __init__(self, module: Any, index: int, half: bool) -> None:
        """``half``: whether matrices may keep copies in float16 for many rows."""
        attention, mlp = module.self_attn, module.mlp
        config = attention.config
        self._index = index
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._window = window_of(attention)
        self._rotates = getattr(attention, "use_rope", True)
        self._factor = float(getattr(module, "residual_multiplier", 1.0))
        self._activation = silu if config.hidden_act == "silu" else mlp.act_fn
        self._norm_1 = Norm(module.input_layernorm)
        self._norm_2 = Norm(module.post_attention_layernorm)
        qk_norm = hasattr(attention, "q_norm")
        self._q_norm = Norm(attention.q_norm) if qk_norm else None
        self._k_norm = Norm(attention.k_norm) if qk_norm else None
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = mlp.down_proj.in_features
        self._dtype = attention.o_proj.weight.dtype
        first, second = self._norm_1.bound(), self._norm_2.bound()
        qkv = Matrix.of(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")
        gate_up = Matrix.of(mlp, "gate_up_proj", "gate_proj", "up_proj")
        # What attention gives lies between the values, element by element.
        value = qkv.largest(first, (self._heads + self._kv_heads) * self._head_dim)
        attended = Bound(value * attention.o_proj.in_features**0.5, value)
        product = gate_up.largest(second, 0, self._width) * gate_up.largest(second, self._width)
        # What is gated is multiplied in the dtype of the gate.
        gated = Bound(product * self._width**0.5, product) if fits_half(product) else None
        self._qkv = qkv.packed(first if half else None)
        self._out = Matrix.of(attention, "o_proj").packed(
            attended if half else None, may_shrink=True
        )
        self._gate_up = gate_up.packed(second if half and gated else None)
        self._down = Matrix.of(mlp, "down_proj").packed(gated if half else None, may_shrink=True)

    def linears(self) -> list[Linear]:
        return [self._qkv, self._out, self._gate_up, self._down]

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Any,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x``: the residual stream, ``[T or more, hidden]`` float32; may be overwritten. What
        follows its first T rows is computed and has no meaning. ``wanted``: those of its rows that
        are to be returned; None: all."""
        tokens, rows = len(cos), len(x)
        qkv = self._qkv(self._norm_1(x, self._qkv.input_dtype(rows)))[:tokens]
        if qkv.dtype != self._dtype:
            qkv = qkv.float().to(self._dtype)  # the direct way is several times slower
        qkv = qkv.view(tokens, -1, self._head_dim)
        rotated = self._heads + self._kv_heads
        if not self._rotates:
            query, key = qkv[:, : self._heads], qkv[:, self._heads : rotated]
        elif self._q_norm is None or self._k_norm is None:
            qk = _rotate(qkv[:, :rotated], cos, sin)
            query, key = qk[:, : self._heads], qk[:, self._heads :]
        else:
            query = _rotate(self._q_norm(qkv[:, : self._heads], self._dtype), cos, sin)
            key = _rotate(self._k_norm(qkv[:, self._heads : rotated], self._dtype), cos, sin)
        attended = batch.attend(
            self._index,
            query,
            key,
            qkv[:, rotated:],
            scale=self._scale,
            window=self._window,
            softcap=None,
            sinks=None,
        ).reshape(tokens, -1)
        if wanted is not None:
            if not len(wanted):
                return x[:0]
            attended, x = attended.index_select(0, wanted), x.index_select(0, wanted)
            rows = self._out.suited_rows(len(wanted))
            x = with_rows(x, rows)
        attended = with_rows(attended.to(self._out.input_dtype(rows)), rows)
        x = self._out.plus(attended, x, self._factor)
        both = self._gate_up(self._norm_2(x, self._gate_up.input_dtype(rows)))
        gated = self._activation(both[:, : self._width]).mul_(both[:, self._width :])
        return self._down.plus(gated.to(self._down.input_dtype(rows)), x, self._factor)


def with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of zeros added to make ``rows`` of them."""
    return x if len(x) == rows else pad(x, (0, 0, 0, rows - len(x)))


def window_of(attention: Any) -> int | None:
    """Mistral and Phi-3 keep it in the config alone, Qwen per layer, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if attention.config.model_type in ("mistral", "phi3"):
        return attention.config.sliding_window
    return None


class Matrix(NamedTuple):
    """Linear layers that read the same input, as one. The modules' own weights are given up when
    it is packed: both kept would be twice the memory."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    modules: list[torch.nn.Linear]

    @classmethod
    def of(cls, owner: Any, *names: str) -> Matrix:
        """Of those of ``names`` that ``owner`` has."""
        modules = [getattr(owner, name) for name in names if hasattr(owner, name)]
        biases = [module.bias for module in modules]
        bias = None if any(b is None for b in biases) else torch.cat(biases)
        return cls(torch.cat([module.weight for module in modules]), bias, modules)

    def largest(self, bound: Bound, start: int, stop: int | None = None) -> float:
        """What none of these outputs can exceed."""
        bias = None if self.bias is None else self.bias[start:stop]
        return largest_output(self.weight[start:stop], bias, bound)

    def packed(self, bound: Bound | None, *, may_shrink: bool = False) -> Linear:
        linear = Linear(self.weight, self.bias, bound=bound, may_shrink=may_shrink)
        self.give_up()
        return linear

    def give_up(self) -> None:
        for module in self.modules:
            module.weight = torch.nn.Parameter(self.weight.new_empty(0), requires_grad=False)
