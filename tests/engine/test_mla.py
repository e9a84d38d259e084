"""Multi-head latent attention: what is stored, and that both ways of storing it are right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mell_ray.engine import Engine, load_model
from tests.engine.families import FAMILIES, LATENT
from tests.engine.support import build, drain, generate, prompts, request, small_config


class OtherLinear(nn.Linear):
    """As a quantised projection would be: not a matrix that can be applied from both sides."""


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_a_block_holds_latents_only(family: str) -> None:
    loaded = load_model(build(FAMILIES[family]()), small_config())
    latent = LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]
    assert loaded.kv_shape.block_nbytes(4) == LATENT["num_hidden_layers"] * 4 * latent * 4


def test_where_latents_cannot_be_used_keys_and_values_of_different_width_are_stored() -> None:
    model = build(FAMILIES["deepseek-v3"]())
    model.set_attn_implementation("eager")
    asked = prompts(3, seed=2, longest=20)
    expected = [generate(model, prompt, 12) for prompt in asked]
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.__class__ = OtherLinear
    loaded = load_model(model, small_config())
    heads, widest = LATENT["num_attention_heads"], 16
    assert loaded.kv_shape.block_nbytes(4) == 2 * 2 * 4 * heads * widest * 4
    subject = Engine(loaded, small_config(max_num_batched_tokens=9))
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, 12, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(3)] == expected


def test_a_latent_pool_and_an_expanded_one_share_no_prefix_hash() -> None:
    roots = []
    for kind in (nn.Linear, OtherLinear):
        model = build(FAMILIES["deepseek-v2"]())
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.__class__ = kind
        roots.append(Engine(load_model(model, small_config()), small_config()).prefix_root)
    assert roots[0] != roots[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_a_plain_forward(dtype: torch.dtype) -> None:
    """The self-check of ``load_model`` compares logits; it raises where they are too far apart."""
    loaded = load_model(build(FAMILIES["deepseek-v3"]()).to(dtype), small_config())
    assert loaded.kv_shape.dtype == dtype
