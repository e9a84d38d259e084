"""The Llama block with fewer and larger operations, for a CPU.

transformers' modules stay what a model is made of: they load the weights, and the logits they give
are what the load-time self-check compares with. But on a CPU a decode step is so short that their
many small operations cost as much as the matrices. For decoders whose layers are Llama's (RMSNorm,
rotary embedding, gated MLP), this runs the same arithmetic on the same parameters: the projections
that read the same input as one matrix, packed weights, a table of rotary angles. What is added up
over the layers is kept in float32. Every other model runs as transformers wrote it.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, NamedTuple

import torch
from mell_kernels import narrow
from mell_kernels.linear import (
    NARROW_UP_TO_ROWS,
    Bound,
    Linear,
    add_narrow,
    fits_half,
    half_is_faster,
    largest_output,
    padded_rows,
)
from torch.nn.functional import pad, silu
from transformers import PreTrainedModel

from mell_ray.engine.host_memory import free_bytes

COPY_AFTER_S = 1.0  # after weights have been found: the first tokens come before
# Decoders made of this block, by model_type, with the activation they have been checked with.
# None of these makes anything larger than it was, which the bounds here rely on.
ACTIVATIONS = {
    "llama": "silu",
    "mistral": "silu",
    "qwen2": "silu",
    "qwen3": "silu",  # with norms on queries and keys besides
    "phi3": "silu",  # with matrices joined already
    "granite": "silu",  # with constant factors everywhere
    "smollm3": "silu",  # with layers that are not rotated
    "gemma": "gelu_pytorch_tanh",  # with norms around one
}


class _Norm:
    """RMSNorm over the last dimension, computed in float32: fewer and faster operations than
    torch's own, which on a CPU is made of eight."""

    def __init__(self, module: Any) -> None:
        gemma = not hasattr(module, "variance_epsilon")
        self.weight = module.weight.float() + 1.0 if gemma else module.weight.float()
        self._eps = self.weight.new_tensor(module.eps if gemma else module.variance_epsilon)
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


class _Rotary:
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


class _Layer:
    """One decoder layer; takes the weights of its four matrices out of ``module``."""

    def __init__(self, module: Any, index: int, half: bool) -> None:
        """``half``: whether matrices may keep copies in float16 for many rows."""
        attention, mlp = module.self_attn, module.mlp
        config = attention.config
        self._index = index
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._window = _window(attention)
        self._rotates = getattr(attention, "use_rope", True)
        self._factor = float(getattr(module, "residual_multiplier", 1.0))
        self._activation = silu if config.hidden_act == "silu" else mlp.act_fn
        self._norm_1 = _Norm(module.input_layernorm)
        self._norm_2 = _Norm(module.post_attention_layernorm)
        qk_norm = hasattr(attention, "q_norm")
        self._q_norm = _Norm(attention.q_norm) if qk_norm else None
        self._k_norm = _Norm(attention.k_norm) if qk_norm else None
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = mlp.down_proj.in_features
        self._dtype = attention.o_proj.weight.dtype
        first, second = self._norm_1.bound(), self._norm_2.bound()
        qkv = _Matrix.of(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")
        gate_up = _Matrix.of(mlp, "gate_up_proj", "gate_proj", "up_proj")
        # What attention gives lies between the values, element by element.
        value = qkv.largest(first, (self._heads + self._kv_heads) * self._head_dim)
        attended = Bound(value * attention.o_proj.in_features**0.5, value)
        product = gate_up.largest(second, 0, self._width) * gate_up.largest(second, self._width)
        # What is gated is multiplied in the dtype of the gate.
        gated = Bound(product * self._width**0.5, product) if fits_half(product) else None
        self._qkv = qkv.packed(first if half else None)
        self._out = _Matrix.of(attention, "o_proj").packed(
            attended if half else None, may_shrink=True
        )
        self._gate_up = gate_up.packed(second if half and gated else None)
        self._down = _Matrix.of(mlp, "down_proj").packed(gated if half else None, may_shrink=True)

    def linears(self) -> list[Linear]:
        return [self._qkv, self._out, self._gate_up, self._down]

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Any
    ) -> torch.Tensor:
        """``x``: the residual stream, ``[T or more, hidden]`` float32; may be overwritten. What
        follows its first T rows is computed and has no meaning."""
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
        attended = _with_rows(attended.to(self._out.input_dtype(rows)), rows)
        x = self._out.plus(attended, x, self._factor)
        both = self._gate_up(self._norm_2(x, self._gate_up.input_dtype(rows)))
        gated = self._activation(both[:, : self._width]).mul_(both[:, self._width :])
        return self._down.plus(gated.to(self._down.input_dtype(rows)), x, self._factor)


def _with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of zeros added to make ``rows`` of them."""
    return x if len(x) == rows else pad(x, (0, 0, 0, rows - len(x)))


def _window(attention: Any) -> int | None:
    """Mistral and Phi-3 keep it in the config alone, Qwen per layer, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if attention.config.model_type in ("mistral", "phi3"):
        return attention.config.sliding_window
    return None


class _Matrix(NamedTuple):
    """Linear layers that read the same input, as one. The modules' own weights are given up when
    it is packed: both kept would be twice the memory."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    modules: list[torch.nn.Linear]

    @classmethod
    def of(cls, owner: Any, *names: str) -> _Matrix:
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
        for module in self.modules:
            module.weight = torch.nn.Parameter(self.weight.new_empty(0), requires_grad=False)
        return linear


class FusedDecoder:
    """Runs a whole model: ids to logits.

    Where other layouts of bfloat16 weights are faster, it keeps them too, one for few rows and one
    for many: each for all matrices or for none, as memory allows. Only the latter is part of what
    is pickled; the former is made again.
    """

    def __init__(self, model: Any, copies_share: float) -> None:
        """``copies_share``: share of the host's free memory that such copies may take."""
        self._copies_share = copies_share
        linears = _linears(model)
        self._copy_nbytes = 2 * sum(linear.weight.numel() for linear in linears)
        bf16 = all(linear.weight.dtype == torch.bfloat16 for linear in linears)
        self._can_be_narrow = bf16 and narrow.is_faster()
        room = copies_share * free_bytes() - self._copy_nbytes * self._can_be_narrow
        half = bf16 and half_is_faster() and self._copy_nbytes <= room
        decoder, config = model.model, model.config
        self._embedding = decoder.embed_tokens
        self._factor = float(getattr(config, "embedding_multiplier", 1.0))
        self._divisor = float(getattr(config, "logits_scaling", 1.0))
        self._rotary = _Rotary(decoder.rotary_emb, self._embedding.weight)
        self._layers = [_Layer(layer, i, half) for i, layer in enumerate(decoder.layers)]
        self._norm = _Norm(decoder.norm)
        head, bound = model.lm_head, self._norm.bound() if half else None
        tied = head.weight is self._embedding.weight
        self._head = (
            Linear(head.weight, head.bias, bound=bound)
            if tied
            else _Matrix.of(model, "lm_head").packed(bound)
        )
        if self._has_room_for_narrow():
            add_narrow(self.linears())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A replica that wakes, or finds its weights there, answers first: its copies for few rows
        are made while it does."""
        self.__dict__.update(state)
        if self._has_room_for_narrow():
            linears = [weakref.ref(linear) for linear in self.linears()]
            copying = threading.Timer(COPY_AFTER_S, _add_narrow_to, [linears])
            copying.daemon = True
            copying.start()

    def _has_room_for_narrow(self) -> bool:
        room = self._copies_share * free_bytes()
        return self._can_be_narrow and self._copy_nbytes <= room

    def linears(self) -> list[Linear]:
        return [*(linear for layer in self._layers for linear in layer.linears()), self._head]

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_rows: torch.Tensor,
        end: int,
        batch: Any,
    ) -> torch.Tensor:
        """Logits ``[len(logits_rows), V]`` of ids and positions ``[T]``, these below ``end``, in
        the dtype that they were computed in."""
        x = _with_rows(self._embedding(input_ids).float(), self._rows(len(input_ids)))
        if self._factor != 1.0:
            x = x * self._factor
        cos, sin = self._rotary.rows(position_ids, end)
        for layer in self._layers:
            x = layer(x, cos, sin, batch)
        last = x.index_select(0, logits_rows)
        logits = self._logits(_with_rows(last, self._rows(len(last))))[: len(logits_rows)]
        return logits if self._divisor == 1.0 else logits.float() / self._divisor

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(x, self._head.input_dtype(len(x))))

    def _rows(self, rows: int) -> int:
        return padded_rows(rows) if self._head.is_compiled(rows) else rows

    @torch.inference_mode()
    def compile_products(self, max_tokens: int, max_logits: int, limit_s: float) -> None:
        """Have the products of steps of up to ``max_tokens`` tokens and ``max_logits`` rows of
        logits compiled now, few rows first, for about ``limit_s`` at most: what is not is compiled
        in the step that first needs it."""
        until = time.monotonic() + limit_s
        narrow_rows = NARROW_UP_TO_ROWS if self._can_be_narrow else 0
        rows = padded_rows(narrow_rows + 1)
        while rows <= padded_rows(max_tokens) and time.monotonic() < until:
            x = self._embedding.weight.new_zeros((rows, self._embedding.embedding_dim)).float()
            cos, sin = self._rotary.rows(torch.zeros(rows, dtype=torch.int64), 1)
            self._layers[0](x, cos, sin, NoContext())
            if rows <= padded_rows(max_logits):
                self._logits(x)
            rows = padded_rows(rows + 1)


class NoContext:
    """Stands for a batch where only the shapes of what a layer computes count."""

    def attend(self, layer: int, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        del layer
        return query


def _add_narrow_to(linears: list[weakref.ref[Linear]]) -> None:
    """One after the other, until the model is gone: it may fall asleep meanwhile."""
    for reference in linears:
        linear = reference()
        if linear is None:
            return
        add_narrow([linear])


def fuse(model: PreTrainedModel, copies_share: float) -> FusedDecoder | None:
    """A fused ``model``, or None if it is not on a CPU or not made of Llama's block; see
    ``FusedDecoder``.

    ``model`` gives its matrices away and cannot run any more afterwards.
    """
    if model.device.type != "cpu" or not _is_llama_block(model):
        return None
    return FusedDecoder(model, copies_share)


def _is_llama_block(model: PreTrainedModel) -> bool:
    """By class, not by what attributes look like: a subclass may compute something else."""
    name = model.config.model_type
    home = f"transformers.models.{name}.modeling_{name}"
    if name not in ACTIVATIONS or type(model).__module__ != home:
        return False
    if not type(model).__name__.endswith("ForCausalLM"):
        return False
    if model.config.hidden_act != ACTIVATIONS[name]:
        return False
    rope = model.config.rope_parameters or {}
    # Tables reach beyond the length up to which longrope is fixed.
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("rope_type") == "longrope":
        return False
    return all(type(linear) is torch.nn.Linear for linear in _linears(model))


def _linears(model: PreTrainedModel) -> list[Any]:
    """The modules whose matrices are packed."""
    return [m for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"]
