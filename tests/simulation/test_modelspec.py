"""Figures against what is published of the models, computed by hand where a formula is short."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mell_ray.errors import ConfigError
from mell_ray.simulation.modelspec import attention_doubles_at, model_spec, spec_from_config

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8"},
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}


def spec(config: dict[str, Any], **options: Any) -> Any:
    return spec_from_config(config, name="m", **options)


@pytest.mark.parametrize(
    ("config", "kv_bytes", "billions", "active"),
    [
        (LLAMA_3_8B, 2 * 32 * 8 * 128 * 2, 8.03, 7.50),  # 131072 bytes
        (QWEN3_06B, 2 * 28 * 8 * 128 * 2, 0.596, 0.596),  # head_dim is not hidden / heads
        (MIXTRAL, 131072, 46.7, 12.8),
        (DEEPSEEK_V3, 61 * (512 + 64) * 2, 671.0, 36.6),
        (GPT2, 2 * 12 * 768 * 2, 0.163, 0.124),  # not told to be tied: counted twice
    ],
    ids=["llama-3-8b", "qwen3-0.6b", "mixtral-8x7b", "deepseek-v3", "gpt2"],
)
def test_known_models(
    config: dict[str, Any], kv_bytes: int, billions: float, active: float
) -> None:
    got = spec({"tie_word_embeddings": False, **config})
    assert got.kv_bytes_per_token == kv_bytes
    assert got.num_params / 1e9 == pytest.approx(billions, rel=0.01)
    assert got.active_params / 1e9 == pytest.approx(active, rel=0.01)


def test_dtypes_decide_bytes() -> None:
    assert spec(LLAMA_3_8B).weight_bytes == pytest.approx(2 * 8.03e9, rel=0.001)
    assert spec(LLAMA_3_8B, kv_cache_dtype="fp8").kv_bytes_per_token == 65536
    assert spec({**LLAMA_3_8B, "torch_dtype": "float32"}).kv_bytes_per_token == 262144
    assert spec(DEEPSEEK_V3).weight_bytes == pytest.approx(671e9, rel=0.01)
    awq = {**LLAMA_3_8B, "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert spec(awq).weight_bytes == pytest.approx(8.03e9 / 2, rel=0.001)
    assert spec(awq).kv_bytes_per_token == 131072
    assert spec(LLAMA_3_8B, weights_gib=15.0).weight_bytes == 15 * 2**30


def test_sliding_windows_are_an_upper_bound_and_said_to_be() -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    got = spec({**LLAMA_3_8B, "sliding_window": 4096, "layer_types": kinds})
    assert got.kv_bytes_per_token == 131072
    assert any("16 of 32" in note and "upper bound" in note for note in got.notes)
    assert not any("sliding" in note for note in spec(LLAMA_3_8B).notes)
    unused = {**LLAMA_3_8B, "sliding_window": 4096, "use_sliding_window": False}
    assert not any("sliding" in note for note in spec(unused).notes)


def test_layers_with_a_fixed_state_take_nothing_per_token() -> None:
    kinds = ["linear_attention"] * 24 + ["full_attention"] * 8
    assert spec({**LLAMA_3_8B, "layer_types": kinds}).kv_bytes_per_token == 131072 / 4


def test_the_language_model_inside_a_multimodal_config_counts() -> None:
    assert spec({"model_type": "llava", "text_config": LLAMA_3_8B}) == spec(LLAMA_3_8B)


def test_multi_query_has_one_head() -> None:
    falcon = {**LLAMA_3_8B, "model_type": "falcon", "multi_query": True}
    assert spec(falcon).kv_bytes_per_token == 131072 / 8


def test_what_a_config_leaves_out_comes_from_its_class() -> None:
    got = spec({"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34})
    assert got.kv_values_per_token == 34 * 2 * 4 * 256


def test_read_from_a_file_or_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    assert model_spec(str(path)).max_model_len == 8192
    assert model_spec(str(tmp_path)).kv_bytes_per_token == 131072


def test_a_hub_id_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaConfig

    asked = []

    def from_pretrained(name: str) -> LlamaConfig:
        asked.append(name)
        return LlamaConfig(**LLAMA_3_8B)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    assert model_spec("acme/llama").kv_bytes_per_token == 131072
    assert asked == ["acme/llama"]


def test_errors_name_the_source_and_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"missing\.json: there is no such file"):
        model_spec(str(tmp_path / "missing.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json: cannot read it as JSON"):
        model_spec(str(broken))
    with pytest.raises(ConfigError, match="'num_hidden_layers'"):
        spec({"model_type": "mystery", "hidden_size": 8})
    with pytest.raises(ConfigError, match="--kv-cache-dtype 'int3' is unknown"):
        spec(LLAMA_3_8B, kv_cache_dtype="int3")
    from transformers import AutoConfig

    def offline(name: str) -> None:
        raise OSError(f"We couldn't connect to load {name}\nmore lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ConfigError, match=r"--model acme/none: neither a local path nor.*connect"):
        model_spec("acme/none")


def test_where_attention_costs_as_much_as_the_rest() -> None:
    hidden, inner, layers = 512, 1408, 8
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    }
    matrices = 3 * hidden * hidden + 3 * hidden * inner  # q, o, and k and v of half the heads each
    at = matrices / (2 * hidden)  # scores and sums, over one token
    assert attention_doubles_at(config) == pytest.approx(at, rel=0.01)
    half = ["full_attention", "sliding_attention"] * 4
    assert attention_doubles_at({**config, "layer_types": half}) == pytest.approx(2 * at, rel=0.01)
    assert attention_doubles_at({**config, "sliding_window": 128}) == math.inf
    assert attention_doubles_at({"model_type": "no-such-model"}) == math.inf
