"""Any transformers model whose attention can be replaced, run on paged KV.

The model is transformers' own, unmodified: it calls the attention function registered here, which
finds the pool and the batch in its keyword arguments. Models for which that silently gives wrong
tokens are refused before their weights are read (``families``), by a gate, and by comparing logits
with a plain forward (both ``gate``).

What depends on the version of transformers, 5.23 here: that an attention function it has no mask
for gets none, and all keyword arguments of the forward (``_attention``); that MLA layers hand their
latent to a cache before they expand it (``mla``); that a loading report names missing weights
(``loading``). The comparison of every family with ``generate`` (tests/engine/test_families.py)
tells whether another version keeps to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mell_kernels import ops
from mell_kernels.int8 import Int8Pool
from mell_kernels.metadata import AttentionMetadata
from transformers import AttentionInterface, PreTrainedModel

from mell_ray.config import EngineConfig
from mell_ray.engine import mla
from mell_ray.engine.families import check_config, context_length, end_token_ids
from mell_ray.engine.fused import Decoder, MixedDecoder, fuse
from mell_ray.engine.kv_pool import KVShape
from mell_ray.engine.loading import load_weights
from mell_ray.engine.native_decoder import NativeDecoder

# No "flash" in the name: transformers takes any name that contains it for flash attention.
ATTENTION_NAME = "mell_paged"


class PagedKV:
    """What attention needs in one forward: the pool and the batch's place in it."""

    def __init__(self, pool: torch.Tensor | Int8Pool, meta: AttentionMetadata) -> None:
        self.pool = pool
        self.meta = meta
        self.max_seqlen_k = meta.max_seqlen_k
        self.tap = mla.LatentTap() if pool.shape[2] == 1 else None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query ``[T, Hq, D]``, key ``[T, Hk, D]`` and value ``[T, Hk, DV]``; returns
        ``[T, Hq, DV]``. No value: keys are values too.

        Where D and DV differ, the narrower is padded with zeros: they change no score, and the
        columns that they add to the output are cut off.
        """
        width = self.pool.shape[-1]
        out_width = width if value is None else value.shape[-1]
        query, key = _padded(query, width), _padded(key, width)
        value = None if value is None else _padded(value, width)
        ops.write_kv(self.pool, layer, key, value, self.meta)
        output = ops.paged_attention(
            query,
            self.pool,
            layer,
            self.meta,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        return output[..., :out_width]


def _padded(heads: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - heads.shape[-1]
    return torch.nn.functional.pad(heads, (0, missing)) if missing else heads


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # always None: transformers makes none for our name
    *,
    batch: PagedKV,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[1, H, T, D]`` in, ``[1, T, H, D]`` out."""
    del attention_mask
    if not getattr(module, "is_causal", True):
        raise ValueError("its attention looks ahead")
    layer: int = module.layer_idx  # type: ignore[assignment]
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    queries = query[0].transpose(0, 1)
    if batch.tap is not None:
        latent = batch.tap.take(layer)
        output = batch.attend(layer, mla.absorb(module, queries), latent, None, **options)
        return mla.expand(module, output)[None], None
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    return batch.attend(layer, queries, keys, values, **options)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


@dataclass(slots=True)
class LoadedModel:
    """A model that passed the gate, and the facts of it that the engine needs."""

    model: PreTrainedModel
    name: str
    device: torch.device
    kv_shape: KVShape
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    fused: Decoder | None = None  # runs in the model's place where there is one

    @property
    def kernels(self) -> str:
        """Whose code runs its layers: "triton", "compiled" (``kernels/native``) or "torch"."""
        if self.device.type == "cuda":
            return "triton"
        return "compiled" if isinstance(self.fused, NativeDecoder | MixedDecoder) else "torch"

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_rows: torch.Tensor,
        batch: Any,
        likeliest: bool = False,
    ) -> torch.Tensor:
        """Logits ``[len(logits_rows), vocab_size]`` of a ragged batch ``[1, T]``: fp32, or as a
        fused model computes them, which to convert costs as much as to choose from. With
        ``likeliest``, what ``ops.likeliest`` says of them, which may need only a few of them.

        ``logits_rows`` rise.
        """
        if self.fused is not None:
            end = batch.max_seqlen_k
            return self.fused(input_ids[0], position_ids[0], logits_rows, end, batch, likeliest)
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            past_key_values=batch.tap,
            logits_to_keep=logits_rows,
            batch=batch,
        )
        logits = output.logits[0].float()
        return ops.likeliest(logits) if likeliest else logits


def load_model(
    source: str | PreTrainedModel, config: EngineConfig | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a model and make sure that it runs correctly on paged KV.

    Args:
        source: a Hugging Face id, a local directory, 'builtin', or a model already built, which
            is switched to paged attention in place (with it everything that shares its config) and
            may lose its weights to a faster form of itself.
        config: dtype, revision, max_model_len and block_size are read from it.

    Raises:
        ConfigError: the source cannot be loaded, or a setting does not suit it.
        UnsupportedModelError: the engine cannot run this model correctly; says why.
    """
    from mell_ray.engine import gate

    config = config or EngineConfig()
    target = torch.device(device)
    if isinstance(source, PreTrainedModel):
        check_config(source.config, config.max_model_len)
        model = source.to(target)
    else:
        model = load_weights(source, config, target)
    model = model.eval().requires_grad_(False)
    kv_shape = gate.admit(model)
    name = source if isinstance(source, str) else model.config.model_type
    text_config = model.config.get_text_config(decoder=True)
    loaded = LoadedModel(
        model=model,
        name=name,
        device=target,
        kv_shape=kv_shape,
        vocab_size=int(text_config.vocab_size),
        max_model_len=context_length(model.config, config.max_model_len),
        eos_token_ids=end_token_ids(getattr(model, "generation_config", None), model.config),
        num_parameters=model.num_parameters(),
    )
    expected = gate.plain_logits(loaded)
    loaded.fused = fuse(model, config.weight_copies_share)
    gate.self_check(loaded, expected, config.block_size)
    return loaded
