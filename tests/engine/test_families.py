"""Architectures with something special in their attention, against transformers' generate; and
those the engine cannot run, which it must refuse by name instead of answering wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from mell_kernels import ops

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, load_model
from mell_ray.errors import ConfigError, UnsupportedModelError
from tests.engine.families import FAMILIES
from tests.engine.support import (
    TINY,
    Client,
    build,
    drain,
    generate,
    prompts,
    request,
    small_config,
    step,
)
from tests.engine.test_migration import move_kv, move_tokens


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_equals_generate(name: str) -> None:
    """Ragged batch, chunked prefill, a prefix hit, and two requests that move while they decode:
    every token is the one that transformers' generate gives. Run on each upgrade of transformers
    this tells which families still work."""
    model = build(FAMILIES[name]())
    model.set_attn_implementation("eager")
    asked = prompts(4, seed=1, longest=30)
    asked.append([*max(asked, key=len)[:13], 5, 6, 7])
    expected = [generate(model, prompt, 16) for prompt in asked]
    assert len({token for tokens in expected for token in tokens}) > 10
    config = small_config(max_num_batched_tokens=7, max_num_seqs=6)
    loaded = load_model(model, config)
    home, away, client = Engine(loaded, config), Engine(loaded, config), Client()
    for i, prompt in enumerate(asked[:-1]):
        home.add(request(f"r{i}", prompt, 16, arrival_s=i))
    while not client.tokens.get("r2"):
        step([home], client)
    home.add(request("r4", asked[-1], 16, arrival_s=9))
    move_kv(home, away, "r2", client, stages=2)
    step([home, away], client)
    move_tokens(home, away, "r3", client, stages=1)
    assert len(away.sequences()) == 2
    drain([home, away], client)
    assert [client.tokens[f"r{i}"] for i in range(5)] == expected
    assert home.stats().prefix_hit_tokens >= 12


REFUSED: dict[str, tuple[Any, str]] = {
    "encoder": (
        lambda: hf.BertConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
        ),
        "looks ahead",
    ),
    "falcon": (
        lambda: hf.FalconConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
        "ignores the interface",
    ),
    "llama4": (
        lambda: hf.Llama4TextConfig(
            **{**TINY, "num_local_experts": 2}, head_dim=8, intermediate_size_mlp=48
        ),
        "chunked_attention",
    ),
    "dynamic": (
        lambda: hf.LlamaConfig(
            **TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        ),
        "'dynamic' depends on the longest sequence",
    ),
    "longrope": (
        lambda: hf.Phi3Config(
            **TINY,
            original_max_position_embeddings=128,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 128,
            },
        ),
        "'longrope' depends on the longest sequence",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_answer_wrongly_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        load_model(build(make()), small_config())
    assert "supported are" in str(error.value)
    assert "Llama" in str(error.value)


def test_the_self_check_refuses_attention_that_is_not_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that passes the gate by name, but comes out different on paged KV."""
    honest = ops.paged_attention

    def ignores_the_window(*args: Any, window: int | None, **kwargs: Any) -> torch.Tensor:
        del window
        return honest(*args, window=None, **kwargs)

    monkeypatch.setattr(ops, "paged_attention", ignores_the_window)
    model = build(hf.MistralConfig(**TINY, sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="differ from a plain forward"):
        load_model(model, small_config())


def test_a_saved_directory_loads(tmp_path: Path) -> None:
    model = build(hf.Qwen2Config(**TINY))
    expected = generate(model, [5, 6, 7], 10)
    model.to(torch.bfloat16).float().save_pretrained(tmp_path)
    config = small_config(max_model_len=100)
    loaded = load_model(str(tmp_path), config)
    assert loaded.kv_shape.dtype == torch.float32
    assert loaded.max_model_len == 100
    assert loaded.eos_token_ids == (1,)
    subject = Engine(loaded, config)
    subject.add(request("r", [5, 6, 7], 10))
    assert len(drain(subject).tokens["r"]) == len(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(tmp_path: Path, dtype: str) -> None:
    build(hf.LlamaConfig(**TINY)).save_pretrained(tmp_path)
    config = small_config(dtype=dtype)
    loaded = load_model(str(tmp_path), config)
    assert loaded.kv_shape.dtype == getattr(torch, dtype)
    subject = Engine(loaded, config)
    subject.add(request("r", [5, 6, 7], 10, ignore_eos=True, temperature=1.0))
    assert len(drain(subject).tokens["r"]) == 10


def test_a_source_that_is_none_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the model .*'builtin'"):
        load_model(str(tmp_path), EngineConfig())


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len \(512\) exceeds the model's 256"):
        load_model(build(hf.LlamaConfig(**TINY)), small_config(max_model_len=512))


def test_a_pool_too_small_for_one_block_is_refused() -> None:
    loaded = load_model(build(hf.LlamaConfig(**TINY)), small_config())
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        Engine(loaded, EngineConfig(kv_cache_memory_bytes=1000))


def test_several_end_tokens_come_from_the_generation_config() -> None:
    model = build(hf.LlamaConfig(**TINY))
    model.generation_config.eos_token_id = [1, 9]
    assert load_model(model, small_config()).eos_token_ids == (1, 9)
