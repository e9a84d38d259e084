"""Llama's block run by compiled code on a CPU (``mell_kernels.native``), where there is some.

As in ``fused``, transformers' modules stay what a model is made of, and this runs the same
arithmetic on the same parameters. What lies between two products is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mell_kernels import native, ops
from mell_kernels.native_screen import NativeScreen, is_possible
from mell_kernels.screen import nbytes

from mell_ray.engine.fused_block import Matrix, Norm, Rotary, window_of
from mell_ray.engine.host_memory import free_bytes


class NativeDecoder:
    """Runs a whole model: ids to logits. Takes the weights of its matrices out of it, unless
    ``keeps``."""

    def __init__(self, model: Any, copies_share: float, keeps: bool = False) -> None:
        """``copies_share``: share of the host's free memory that a screen of the matrix that gives
        the logits may take."""
        decoder, config = model.model, model.config
        self._embedding = decoder.embed_tokens
        self._factor = float(getattr(config, "embedding_multiplier", 1.0))
        self._divisor = float(getattr(config, "logits_scaling", 1.0))
        self._rotary = Rotary(decoder.rotary_emb, torch.empty(0))
        weights = [_weights(layer, keeps) for layer in decoder.layers]
        self._layers = native.Layers(
            weights, config.num_attention_heads, config.num_key_value_heads
        )
        self._norm = Norm(decoder.norm)
        head = Matrix.of(model, "lm_head")
        self._head = native.pack(head.weight, head.bias)
        has_screen = (
            head.bias is None
            and self._divisor > 0
            and nbytes(head.weight) <= copies_share * free_bytes()
            and is_possible(head.weight)
        )
        self._screen = NativeScreen.of(head.weight) if has_screen else None
        if not keeps and head.weight is not self._embedding.weight:
            head.give_up()

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_rows: torch.Tensor,
        end: int,
        batch: Any,
        likeliest: bool = False,
    ) -> torch.Tensor:
        """See ``fused.FusedDecoder``."""
        x = self._embedding(input_ids).float()
        if self._factor != 1.0:
            x *= self._factor
        angles = self._rotary.rows(position_ids, end)
        if self._layers.suits(batch.pool):
            x = self._layers.run(x, *angles, batch.pool, batch.meta, logits_rows)
        else:
            x = self._layers.run_around(x, *angles, batch.attend, logits_rows)
        if likeliest and self._screen is not None and len(x):
            ids = self._screen.likeliest(x, self._norm.weight, self._norm.eps, self._head)
            if ids is not None:
                return ids
        x = self._head(self._norm(x, torch.float32))
        logits = x if self._divisor == 1.0 else x / self._divisor
        return ops.likeliest(logits) if likeliest else logits

    def matrices(self) -> list[native.Packed]:
        return [*self._layers.matrices(), self._head]

    def compile_products(self, max_tokens: int, max_logits: int, limit_s: float) -> None:
        """They are compiled already."""


def can_be_native(model: Any) -> bool:
    """Whether a model made of Llama's block, its matrices in bfloat16, can be run so."""
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    inputs = [attention.o_proj.in_features, mlp.down_proj.in_features, model.config.hidden_size]
    return native.is_possible(attention.head_dim, inputs)


def _weights(layer: Any, keeps: bool) -> native.LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norm_1, norm_2 = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
    q_norm, k_norm = (
        Norm(getattr(attention, name)) if hasattr(attention, name) else None
        for name in ("q_norm", "k_norm")
    )

    def packed(pack: Callable[..., native.Packed], owner: Any, *names: str) -> native.Packed:
        matrix = Matrix.of(owner, *names)
        result = pack(matrix.weight, matrix.bias)
        if not keeps:
            matrix.give_up()
        return result

    return native.LayerWeights(
        packed(native.pack, attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        packed(native.pack, attention, "o_proj"),
        packed(native.pack_gated, mlp, "gate_up_proj", "gate_proj", "up_proj"),
        packed(native.pack, mlp, "down_proj"),
        norm_1=norm_1.weight,
        norm_2=norm_2.weight,
        eps=norm_1.eps,
        scale=attention.scaling,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        qk_eps=0.0 if q_norm is None else q_norm.eps,
        window=window_of(attention),
        factor=float(getattr(layer, "residual_multiplier", 1.0)),
        rotates=getattr(attention, "use_rope", True),
        gelu=attention.config.hidden_act != "silu",
    )
