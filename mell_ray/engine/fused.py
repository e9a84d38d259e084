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
from typing import Any

import torch
from mell_kernels import narrow, ops, screen
from mell_kernels.linear import (
    NARROW_UP_TO_ROWS,
    Linear,
    add_narrow,
    half_is_faster,
    padded_rows,
)
from transformers import PreTrainedModel

from mell_ray.engine.fused_block import Layer, Matrix, Norm, Rotary, with_rows
from mell_ray.engine.host_memory import free_bytes
from mell_ray.engine.native_decoder import NativeDecoder, can_be_native

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


class FusedDecoder:
    """Runs a whole model: ids to logits.

    Where other layouts of bfloat16 weights are faster, it keeps them too, one for few rows and one
    for many: each for all matrices or for none, as memory allows. So it does with a screen of the
    matrix that gives the logits. Only the layout for many rows is part of what is pickled; the
    others are made again.
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
        self._rotary = Rotary(decoder.rotary_emb, self._embedding.weight)
        self._layers = [Layer(layer, i, half) for i, layer in enumerate(decoder.layers)]
        self._norm = Norm(decoder.norm)
        head, bound = model.lm_head, self._norm.bound() if half else None
        tied = head.weight is self._embedding.weight
        self._screen_nbytes = screen.nbytes(head.weight) + (0 if tied else head.weight.nbytes)
        self._tied = tied
        self._can_be_screened = (
            head.bias is None and self._divisor > 0 and screen.is_possible(head.weight)
        )
        self._head = (
            Linear(head.weight, head.bias, bound=bound)
            if tied
            else Matrix.of(model, "lm_head").packed(bound)
        )
        if self._has_room_for_narrow():
            add_narrow(self.matrices())
        weight = self._screened_weight()
        self._screen = None if weight is None else screen.Screen(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_screen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A replica that wakes, or finds its weights there, answers first: what is not pickled is
        made while it does."""
        self.__dict__.update(state)
        copying = threading.Timer(COPY_AFTER_S, _complete, [weakref.ref(self)])
        copying.daemon = True
        copying.start()

    def _has_room_for_narrow(self) -> bool:
        room = self._copies_share * free_bytes()
        return self._can_be_narrow and self._copy_nbytes <= room

    def _screened_weight(self) -> torch.Tensor | None:
        """What the head's screen is to be made of; None: there is to be none."""
        if not self._can_be_screened or self._screen_nbytes > self._copies_share * free_bytes():
            return None
        return self._embedding.weight if self._tied else self._head.plain()[0]

    def matrices(self) -> list[Linear]:
        return [*(linear for layer in self._layers for linear in layer.linears()), self._head]

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_rows: torch.Tensor,
        end: int,
        batch: Any,
        likeliest: bool = False,
    ) -> torch.Tensor:
        """Logits ``[len(logits_rows), V]`` of ids and positions ``[T]``, these below ``end``, in
        the dtype that they were computed in; with ``likeliest``, what ``ops.likeliest`` says of
        them. ``logits_rows`` rise."""
        rows = self._head.suited_rows(len(input_ids))
        x = with_rows(self._embedding(input_ids).float(), rows)
        if self._factor != 1.0:
            x = x * self._factor
        cos, sin = self._rotary.rows(position_ids, end)
        *layers, last = self._layers
        for layer in layers:
            x = layer(x, cos, sin, batch)
        # Of the last layer, what follows its attention is of use to nobody else.
        count = len(logits_rows)
        x = last(x, cos, sin, batch, logits_rows if count < len(input_ids) else None)[:count]
        if likeliest:
            return self._likeliest(x)
        return self._logits(x)

    def _likeliest(self, x: torch.Tensor) -> torch.Tensor:
        if self._screen is not None and len(x):
            ids = self._screen.likeliest(self._norm(x, torch.float32))
            if ids is not None:
                return ids
        return ops.likeliest(self._logits(x))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._head.suited_rows(len(x))
        logits = self._products(with_rows(x, rows))[: len(x)]
        return logits if self._divisor == 1.0 else logits.float() / self._divisor

    def _products(self, x: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(x, self._head.input_dtype(len(x))))

    @torch.inference_mode()
    def compile_products(self, max_tokens: int, max_logits: int, limit_s: float) -> None:
        """Have the products of steps of up to ``max_tokens`` tokens and ``max_logits`` rows of
        logits compiled now, few rows first, for about ``limit_s`` at most: what is not is compiled
        in the step that first needs it."""
        until = time.monotonic() + limit_s
        rows = 1
        while self._screen is not None and rows <= max_logits and time.monotonic() < until:
            self._screen.compile(rows)
            rows = padded_rows(rows + 1)
        narrow_rows = NARROW_UP_TO_ROWS if self._can_be_narrow else 0
        rows = padded_rows(narrow_rows + 1)
        while rows <= padded_rows(max_tokens) and time.monotonic() < until:
            x = self._embedding.weight.new_zeros((rows, self._embedding.embedding_dim)).float()
            cos, sin = self._rotary.rows(torch.zeros(rows, dtype=torch.int64), 1)
            self._layers[0](x, cos, sin, NoContext())
            if rows <= padded_rows(max_logits):
                self._products(x)
            rows = padded_rows(rows + 1)


class NoContext:
    """Stands for a batch where only the shapes of what a layer computes count."""

    pool = None

    def attend(self, layer: int, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        del layer
        return query


def _complete(reference: weakref.ref[FusedDecoder]) -> None:
    """Make what a decoder is not pickled with, one thing after the other, until it is gone: the
    model may fall asleep meanwhile."""
    decoder = reference()
    if decoder is None:
        return
    narrow_room = decoder._has_room_for_narrow()
    linears = [weakref.ref(linear) for linear in decoder.matrices()] if narrow_room else []
    del decoder
    for each in linears:
        linear = each()
        if linear is None:
            return
        add_narrow([linear])
        del linear
    decoder = reference()
    weight = None if decoder is None else decoder._screened_weight()
    del decoder
    if weight is not None:
        made = screen.Screen(weight)
        decoder = reference()
        if decoder is not None:
            decoder._screen = made


class MixedDecoder:
    """Steps of few tokens by compiled code; those of many by a CPU's matrix unit, which only
    libraries use."""

    FEW = 64

    def __init__(self, model: Any, copies_share: float) -> None:
        self.few = NativeDecoder(model, copies_share, keeps=True)
        self.many = FusedDecoder(model, copies_share)

    def __call__(self, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        """See ``FusedDecoder``."""
        some = self.few if len(input_ids) <= self.FEW else self.many
        return some(input_ids, *args)

    def compile_products(self, max_tokens: int, max_logits: int, limit_s: float) -> None:
        self.many.compile_products(max_tokens, max_logits, limit_s)


Decoder = FusedDecoder | NativeDecoder | MixedDecoder


def fuse(model: PreTrainedModel, copies_share: float) -> Decoder | None:
    """A fused ``model``, or None if it is not on a CPU or not made of Llama's block.

    ``model`` gives its matrices away and cannot run any more afterwards.

    Args:
        copies_share: see ``FusedDecoder``.
    """
    if model.device.type != "cpu" or not _is_llama_block(model):
        return None
    if all(m.weight.dtype == torch.bfloat16 for m in _linears(model)) and can_be_native(model):
        if not torch.cpu.get_capabilities().get("amx_bf16"):
            return NativeDecoder(model, copies_share)
        if sum(linear.weight.nbytes for linear in _linears(model)) <= copies_share * free_bytes():
            return MixedDecoder(model, copies_share)
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
