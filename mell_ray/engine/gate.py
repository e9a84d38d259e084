"""Whether a loaded model really runs on paged KV, found out before the first request.

A model that ignores the attention interface, or needs a mask the paged attention does not know,
raises nothing: it answers with wrong tokens. So each must show that it uses what it is given, and
must reproduce the logits of a plain forward. Known trouble is refused earlier, see ``families``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mell_kernels import ops
from transformers import PreTrainedModel

from mell_ray.engine import mla
from mell_ray.engine.batch import BatchBuilder
from mell_ray.engine.families import refusal
from mell_ray.engine.kv_pool import KVPool, KVShape
from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import UnsupportedModelError

if TYPE_CHECKING:
    from mell_ray.engine.model import LoadedModel

# Logits of the self-check may differ (RMS) by this share of their standard deviation. Rounding in
# half precision alone reaches 0.03 in a deep model, and more where it changes an expert's choice;
# attention gone wrong gives about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
_CHECK_TOKENS = 30
_CHUNK = 9  # 36 rows a step, and 12 at the end: wide products and narrow ones


def _refuse(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return refusal(model.config, reason)


def admit(model: PreTrainedModel) -> KVShape:
    """Switch ``model`` to paged attention and return the shape of its KV.

    Raises:
        UnsupportedModelError: naming the reason.
    """
    from mell_ray.engine.model import ATTENTION_NAME

    if not model._supports_attention_backend:
        raise _refuse(model, "it has attention code of its own and ignores the interface")
    config = model.config.get_text_config(decoder=True)
    model.set_attn_implementation(ATTENTION_NAME)
    if config._attn_implementation != ATTENTION_NAME:
        raise _refuse(model, "it does not let its attention be replaced")
    return _probe(model, config)


class _ShapeProbe:
    """Stands in for the paged KV in one forward and writes down each layer's K and V shapes."""

    tap = None

    def __init__(self) -> None:
        self.layers: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        self.layers.append((layer, tuple(key.shape[1:]), tuple(value.shape[1:])))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


@torch.inference_mode()
def _probe(model: PreTrainedModel, config: Any) -> KVShape:
    probe = _ShapeProbe()
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        model(input_ids=ids, position_ids=ids, use_cache=False, batch=probe)
    except Exception as error:
        raise _refuse(model, f"a forward with replaced attention fails ({error})") from error
    expected = list(range(config.num_hidden_layers))
    if [layer for layer, _, _ in probe.layers] != expected:
        raise _refuse(model, "not every layer has attention with a KV of its own, once")
    first = probe.layers[0][1:]
    for layer, key, value in probe.layers:
        if (key, value) != first:
            raise _refuse(
                model,
                f"layer {layer} has keys {key} and values {value}, layer 0 has {first[0]} and "
                f"{first[1]}",
            )
    latent = mla.latent_dim(model)
    if latent is not None:
        return KVShape(config.num_hidden_layers, 1, latent, model.dtype, planes=1)
    (kv_heads, key_dim), (_, value_dim) = first
    return KVShape(config.num_hidden_layers, kv_heads, max(key_dim, value_dim), model.dtype)


@torch.inference_mode()
def self_check(loaded: LoadedModel, plain: torch.Tensor, block_size: int) -> None:
    """Logits on paged KV, in chunks and beside a neighbour, against ``plain_logits``.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    paged = _paged_logits(loaded, _check_tokens(loaded), block_size)
    error = ((paged - plain).square().mean().sqrt() / plain.std().clamp_min(1e-12)).item()
    limit = _TOLERANCE[loaded.kv_shape.dtype]
    if not error <= limit:
        raise _refuse(
            loaded.model,
            f"its logits on paged KV differ from a plain forward by {error:.2g} of their standard "
            f"deviation (limit {limit:g})",
        )


def _check_tokens(loaded: LoadedModel) -> list[int]:
    count = min(_CHECK_TOKENS, loaded.max_model_len)
    return np.random.default_rng(0).integers(0, loaded.vocab_size, count).tolist()


@torch.inference_mode()
def plain_logits(loaded: LoadedModel) -> torch.Tensor:
    """What the model says to a few random tokens in one plain forward of transformers' own. Taken
    before anything about the model is made faster.

    Raises:
        UnsupportedModelError: it cannot say anything.
    """
    from mell_ray.engine.model import ATTENTION_NAME

    loaded.model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([_check_tokens(loaded)], device=loaded.device)
        return loaded.model(input_ids=ids, use_cache=False).logits[0].float()
    except Exception as error:
        raise _refuse(loaded.model, f"transformers' own forward fails ({error})") from error
    finally:
        loaded.model.set_attn_implementation(ATTENTION_NAME)


def _paged_logits(loaded: LoadedModel, tokens: list[int], block_size: int) -> torch.Tensor:
    """A neighbour three times as long stands in the batch before the sequence looked at."""
    from mell_ray.engine.model import PagedKV

    neighbour = (tokens * 3)[: loaded.max_model_len]
    blocks = [-(-len(ids) // block_size) for ids in (neighbour, tokens)]
    pool = KVPool(loaded.kv_shape, block_size, sum(blocks), loaded.device)
    builder = BatchBuilder(2, max(blocks), block_size, loaded.device)
    seqs = [_check_sequence(ids, block_size) for ids in (neighbour, tokens)]
    seqs[0].row, seqs[0].blocks = 0, list(range(1, blocks[0] + 1))
    seqs[1].row, seqs[1].blocks = 1, list(range(sum(blocks), blocks[0], -1))
    rows = []
    workspace = ops.Workspace()
    while seqs[1].num_to_compute > 0:
        limits = zip(seqs, (3 * _CHUNK, _CHUNK), strict=True)
        chunks = [(s, min(s.num_to_compute, limit)) for s, limit in limits if s.num_to_compute > 0]
        batch = builder.build(chunks)
        ops.prepare(pool.cache, batch.attention, workspace)
        total = batch.input_ids.shape[1]
        wanted = torch.arange(total - chunks[-1][1], total, device=loaded.device)
        context = PagedKV(pool.cache, batch.attention)
        logits = loaded.forward(batch.input_ids, batch.position_ids, wanted, context)
        rows.append(logits.float())
        for seq, chunk in chunks:
            seq.num_computed += chunk
    return torch.cat(rows)


def _check_sequence(tokens: list[int], block_size: int) -> Sequence:
    state = RequestState("self-check", tokens, SamplingParams(max_tokens=1))
    return Sequence(state, block_size, 0, status="running")
