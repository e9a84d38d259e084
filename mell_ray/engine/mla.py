"""Multi-head latent attention (DeepSeek) on a pool that holds latents.

An MLA layer makes its keys and values from one latent a token, which all heads share, and a rotary
part. Storing what the attention function is given, keys and values of every head, would take some
70 times the memory at DeepSeek-V3's sizes, and a request weighs what its KV weighs. So the latent
is stored. The two halves of the projection that would expand it are applied to the query before,
and to the output after, an attention in which the latent is the one key and value of all heads;
that is the "absorbed" form of the DeepSeek-V2 paper (section 2.1.2).

transformers hands the latent to its KV cache before it expands it. ``LatentTap`` stands in that
place; the model itself is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class LatentTap:
    """Takes the latents of one forward where transformers would cache them (``Cache.update``, as
    of transformers 5.23)."""

    def __init__(self) -> None:
        self._taken: dict[int, torch.Tensor] = {}

    def update(
        self, latent: torch.Tensor, rotary: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[1, 1, T, R]`` and ``[1, 1, T, P]``. What is returned gets expanded to keys and values
        that nobody reads, so it is one token."""
        self._taken[layer] = torch.cat((latent, rotary), dim=-1)[0, 0]
        return latent[:, :, :1], rotary[:, :, :1]

    def take(self, layer: int) -> torch.Tensor:
        """The latents of ``layer``'s tokens, ``[T, 1, R + P]``."""
        return self._taken.pop(layer)[:, None]


def latent_dim(model: PreTrainedModel) -> int | None:
    """Width of what a token leaves in a layer, or None where the layers are not all MLA whose
    expansion is one plain matrix."""
    layers = [module for module in model.modules() if hasattr(module, "expand_kv")]
    config = model.config.get_text_config(decoder=True)
    if len(layers) != config.num_hidden_layers:
        return None
    for layer in layers:
        projection = layer.kv_b_proj
        if type(projection) is not torch.nn.Linear or projection.bias is not None:
            return None
    return int(config.kv_lora_rank + config.qk_rope_head_dim)


def absorb(module: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
    """``[T, H, N + P]`` to ``[T, H, R + P]``: queries that match latents instead of keys."""
    up, _ = _halves(module)
    plain, rotary = query.split([up.shape[1], query.shape[-1] - up.shape[1]], dim=-1)
    return torch.cat((torch.bmm(plain.transpose(0, 1), up).transpose(0, 1), rotary), dim=-1)


def expand(module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
    """``[T, H, R + P]``, weighted sums of latents, to ``[T, H, V]``, those of values."""
    _, up = _halves(module)
    latents = output[..., : up.shape[2]].transpose(0, 1)
    return torch.bmm(latents, up.transpose(1, 2)).transpose(0, 1)


def _halves(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What makes a head's key, ``[H, N, R]``, and its value, ``[H, V, R]``, from a latent."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    weight = module.kv_b_proj.weight
    key, value = weight.view(-1, sum(sizes), weight.shape[-1]).split(sizes, dim=1)
    return key, value
