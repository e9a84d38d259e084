"""What the engine cannot run it refuses by name instead of answering wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from mell_kernels import ops

from mell_ray.engine import Engine, load_model
from mell_ray.engine.families import MODEL_TYPES, check_config
from mell_ray.errors import UnsupportedModelError
from tests.engine.families import FAMILIES
from tests.engine.support import TINY, build, drain, generate, request, small_config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
}
LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

REFUSED: dict[str, tuple[Any, str]] = {
    "encoder-decoder": (lambda: hf.T5Config(), "T5.* has an encoder beside its decoder"),
    "encoder": (lambda: hf.BertConfig(), "'bert'.* not one that has been checked"),
    "state-space": (lambda: hf.MambaConfig(), "'linear_attention'"),
    "attention-less": (lambda: hf.RwkvConfig(), "'rwkv'.* not one that has been checked"),
    "linear-attention-hybrid": (lambda: hf.Qwen3NextConfig(), "'linear_attention'"),
    "sparse-attention": (lambda: hf.DeepseekV32Config(), "'deepseek_v32'"),
    "chunked-attention": (lambda: hf.Llama4TextConfig(), "'chunked_attention'"),
    "attention-of-its-own": (lambda: hf.FalconConfig(), "'falcon'"),
    "looks-ahead": (
        lambda: hf.Gemma3TextConfig(use_bidirectional_attention=True),
        "looks ahead",
    ),
    "dynamic-rope": (
        lambda: hf.LlamaConfig(**TINY, rope_parameters=DYNAMIC),
        "'dynamic' depends on the longest sequence",
    ),
    "longrope": (
        lambda: hf.Phi3Config(**TINY, **LONG),
        "'longrope' depends on the longest sequence.*up to 128 tokens it is fixed",
    ),
    "rope-of-another-kind": (
        lambda: hf.Qwen2Config(**TINY, rope_parameters={"rope_type": "mrope", "rope_theta": 1e4}),
        "'mrope' is not one that has been checked",
    ),
    "quantised": (
        lambda: hf.LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq\)",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_answer_wrongly_is_refused_by_its_config(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        check_config(make(), None)
    for supported in ("Llama 2 and 3 (llama)", "DeepSeek V3", "gpt-oss"):
        assert supported in error.value.message


def test_every_admitted_architecture_is_compared_with_generate() -> None:
    assert {make().model_type for make in FAMILIES.values()} == set(MODEL_TYPES)


def test_longrope_runs_below_the_length_at_which_it_changes() -> None:
    model = build(hf.Phi3Config(**TINY, **LONG))
    model.set_attn_implementation("eager")
    expected = generate(model, [5, 6, 7], 12)
    config = small_config(max_model_len=128)
    subject = Engine(load_model(model, config), config)
    subject.add(request("r", [5, 6, 7], 12))
    assert drain(subject).tokens["r"] == expected
    with pytest.raises(UnsupportedModelError, match="longrope"):
        load_model(model, small_config(max_model_len=129))


class OwnAttention(torch.nn.Module):
    """Mixes tokens by itself, whatever attention function is registered."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.project = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.project(hidden_states.cumsum(dim=1)), None


@pytest.mark.parametrize("ignoring", [1, 2])
def test_a_model_that_ignores_the_attention_function(ignoring: int) -> None:
    """All of its layers or one: nothing of that raises an exception by itself."""
    model = build(hf.LlamaConfig(**TINY))
    for layer in model.model.layers[:ignoring]:
        layer.self_attn = OwnAttention(model.config)
    with pytest.raises(UnsupportedModelError, match="not every layer has attention"):
        load_model(model, small_config())


def test_a_model_that_transformers_cannot_run_either() -> None:
    """Layers with a window in a config that names none."""
    layers = ["sliding_attention", "full_attention"]
    model = build(hf.Qwen2Config(**TINY, layer_types=layers, use_sliding_window=False))
    with pytest.raises(UnsupportedModelError, match="transformers' own forward fails"):
        load_model(model, small_config())


def test_a_model_that_does_not_offer_the_interface() -> None:
    model = build(hf.LlamaConfig(**TINY))
    model._supports_attention_backend = False
    with pytest.raises(UnsupportedModelError, match="ignores the interface"):
        load_model(model, small_config())


def test_a_model_that_keeps_its_own_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(hf.LlamaConfig(**TINY))
    monkeypatch.setattr(model, "set_attn_implementation", lambda _: None)
    with pytest.raises(UnsupportedModelError, match="does not let its attention be replaced"):
        load_model(model, small_config())


def test_layers_of_different_shapes() -> None:
    model = build(hf.LlamaConfig(**TINY))
    other = hf.LlamaConfig(**{**TINY, "num_key_value_heads": 4})
    model.model.layers[1].self_attn = build(other).model.layers[1].self_attn
    model.model.layers[1].self_attn.config = model.config
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has keys \(4, 8\)"):
        load_model(model, small_config())


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


def test_the_reason_names_the_architecture_of_the_checkpoint() -> None:
    config = SimpleNamespace(
        model_type="x", architectures=["XForCausalLM"], get_text_config=lambda **_: config
    )
    with pytest.raises(UnsupportedModelError, match=r"^XForCausalLM \(model type 'x'\)"):
        check_config(config, None)
