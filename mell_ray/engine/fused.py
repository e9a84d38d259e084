"""The Llama block with fewer and larger operations, for a CPU.

transformers' modules stay what a model is made of: they load the weights, and the logits they give
are what the load-time self-check compares with. But on a CPU a decode step is so short that their
many small operations cost as much as the matrices. For decoders whose layers are Llama's (RMSNorm,
rotary embedding, gated MLP), this runs the same arithmetic on the same parameters: the projections
that read the same input as one matrix, packed weights, a table of rotary angles, residuals added by
the matrix kernel. Every other model runs as transformers wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mell_kernels.linear import Linear
from torch.nn.functional import embedding, rms_norm, silu
from transformers import PreTrainedModel

# Decoders made of exactly this block, by model_type; Qwen3 has norms on queries and keys besides.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight, float(module.variance_epsilon))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


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
        self._cos = cos[0].view(length, 1, 2, half)
        # rotate_half(x) * sin == swapped halves of x * (-sin, sin)
        self._sin = sin[0].view(length, 1, 2, half).clone()
        self._sin[:, :, 0].neg_()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[T, heads, D]`` rotated by tables of ``[T, 1, 2, D / 2]``."""
    halves = x.view(*x.shape[:2], 2, -1)
    return torch.addcmul(halves * cos, halves.flip(2), sin).view(x.shape)


class _Layer:
    """One decoder layer; takes the weights of its four matrices out of ``module``."""

    def __init__(self, module: Any, index: int) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._index = index
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._window = _window(attention)
        self._norm_1 = _Norm.of(module.input_layernorm)
        self._norm_2 = _Norm.of(module.post_attention_layernorm)
        qk_norm = hasattr(attention, "q_norm")
        self._q_norm = _Norm.of(attention.q_norm) if qk_norm else None
        self._k_norm = _Norm.of(attention.k_norm) if qk_norm else None
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._width = mlp.gate_proj.out_features
        self._qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _joined(attention.o_proj)
        self._gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self._down = _joined(mlp.down_proj)

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Any
    ) -> torch.Tensor:
        qkv = self._qkv(self._norm_1(x)).view(len(x), -1, self._head_dim)
        rotated = self._heads + self._kv_heads
        if self._q_norm is None or self._k_norm is None:
            qk = _rotate(qkv[:, :rotated], cos, sin)
            query, key = qk[:, : self._heads], qk[:, self._heads :]
        else:
            query = _rotate(self._q_norm(qkv[:, : self._heads]), cos, sin)
            key = _rotate(self._k_norm(qkv[:, self._heads : rotated]), cos, sin)
        attended = batch.attend(
            self._index,
            query,
            key,
            qkv[:, rotated:],
            scale=self._scale,
            window=self._window,
            softcap=None,
            sinks=None,
        )
        x = self._out.plus(attended.reshape(len(x), -1), x)
        both = self._gate_up(self._norm_2(x))
        return self._down.plus(silu(both[:, : self._width]).mul_(both[:, self._width :]), x)


def _window(attention: Any) -> int | None:
    """Mistral keeps it in the config alone, Qwen per layer, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window
    return None


def _joined(*modules: torch.nn.Linear) -> Linear:
    """One linear layer that computes all of ``modules``, whose own weights are given up: both kept
    would be twice the memory."""
    weight = torch.cat([module.weight for module in modules])
    biases = [module.bias for module in modules]
    bias = None if any(b is None for b in biases) else torch.cat(biases)  # type: ignore[arg-type]
    linear = Linear(weight, bias)
    for module in modules:
        module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    return linear


class FusedDecoder:
    """Runs a whole model: ids to logits."""

    def __init__(self, model: Any) -> None:
        decoder = model.model
        self._embedding = decoder.embed_tokens
        self._rotary = _Rotary(decoder.rotary_emb, self._embedding.weight)
        self._layers = [_Layer(layer, i) for i, layer in enumerate(decoder.layers)]
        self._norm = _Norm.of(decoder.norm)
        tied = model.lm_head.weight is self._embedding.weight
        self._head = (
            Linear(model.lm_head.weight, model.lm_head.bias) if tied else _joined(model.lm_head)
        )

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_rows: torch.Tensor,
        end: int,
        batch: Any,
    ) -> torch.Tensor:
        """Logits ``[len(logits_rows), V]`` of ids and positions ``[T]``, these below ``end``."""
        x = embedding(input_ids, self._embedding.weight)
        cos, sin = self._rotary.rows(position_ids, end)
        for layer in self._layers:
            x = layer(x, cos, sin, batch)
        return self._head(self._norm(x.index_select(0, logits_rows)))


def fuse(model: PreTrainedModel) -> FusedDecoder | None:
    """A fused ``model``, or None if it is not on a CPU or not made of Llama's block.

    ``model`` gives its matrices away and cannot run any more afterwards.
    """
    if model.device.type != "cpu" or not _is_llama_block(model):
        return None
    return FusedDecoder(model)


def _is_llama_block(model: PreTrainedModel) -> bool:
    """By class, not by what attributes look like: a subclass may compute something else."""
    name = model.config.model_type
    home = f"transformers.models.{name}.modeling_{name}"
    if name not in MODEL_TYPES or type(model).__module__ != home:
        return False
    if not type(model).__name__.endswith("ForCausalLM") or model.config.hidden_act != "silu":
        return False
    linears = [m for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"]
    return all(type(linear) is torch.nn.Linear for linear in linears)
