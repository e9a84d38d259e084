"""Which architectures the engine takes, told from a model's config before its weights are read.

Each is compared token for token with transformers' own ``generate`` by a test of this repository,
through every way a request can take. That is a list of names and not a rule because a model that
needs more than the attention function sees (a mask of its own, a recurrent state, a selection of
keys) does not fail: it answers wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from mell_ray.errors import ConfigError, UnsupportedModelError

MODEL_TYPES = {
    "llama": "Llama 2 and 3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2 and 2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi": "Phi-2",
    "phi3": "Phi-3 and 4",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "cohere2": "Command R7B",
    "smollm3": "SmolLM3",
    "starcoder2": "StarCoder2",
    "glm4": "GLM-4",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3 and R1",
    "gpt_neox": "GPT-NeoX",
    "gpt2": "GPT-2",
    "opt": "OPT",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
_OF_THE_LONGEST = ("dynamic", "longrope")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


# What transformers raises where a config.json makes no sense to it.
CONFIG_ERRORS = (OSError, ValueError, KeyError, StrictDataclassError)


def first_line(error: BaseException) -> str:
    """The beginning of somebody else's message, without what follows at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:count] or [type(error).__name__]).rstrip(".;:")


def refusal(config: Any, reason: str) -> UnsupportedModelError:
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    supported = ", ".join(f"{label} ({key})" for key, label in MODEL_TYPES.items())
    return UnsupportedModelError(
        f"{name} (model type {config.model_type!r}) cannot run: {reason}; supported are: "
        f"{supported}",
        param="model_source",
    )


def check_config(config: Any, max_model_len: int | None) -> None:
    """Refuse what is known to go wrong with its reason, and all else that is not on the list.

    Args:
        max_model_len: the configured limit, None for the model's own.

    Raises:
        UnsupportedModelError: naming the reason.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise refusal(config, "it has an encoder beside its decoder")
    for layer_type in getattr(text, "layer_types", None) or ():
        if layer_type not in LAYER_TYPES:
            raise refusal(config, f"it has layers of type {layer_type!r}")
    if config.model_type not in MODEL_TYPES:
        raise refusal(config, "its architecture is not one that has been checked here")
    if getattr(text, "use_bidirectional_attention", False):
        raise refusal(config, "its attention looks ahead")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise refusal(
            config,
            f"its weights are quantised ({_quantization_method(quantization)}), which has not been "
            "checked here; give a checkpoint in float32, bfloat16 or float16",
        )
    for parameters in _rope_parameters(text):
        _check_rope(config, parameters, max_model_len)


def context_length(config: Any, max_model_len: int | None) -> int:
    """Prompt and output tokens at most: as configured, or as many as the model has positions.

    Raises:
        ConfigError: neither says, or more are configured than the model has.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if max_model_len is None:
        if limit is None:
            raise ConfigError(
                "the model's config names no max_position_embeddings; set max_model_len",
                param="max_model_len",
            )
        return int(limit)
    if limit is not None and max_model_len > limit:
        raise ConfigError(
            f"max_model_len ({max_model_len}) exceeds the model's {limit} positions",
            param="max_model_len",
        )
    return max_model_len


def end_token_ids(generation: Any, config: Any) -> tuple[int, ...]:
    """Of the generation config, which knows chat models' several end tokens, else of the model's.

    Args:
        generation: None where the model has none.
    """
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))


def _rope_parameters(text_config: Any) -> Iterator[dict[str, Any]]:
    """Parameters of the rotary embedding, whether flat or once per layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]


def _check_rope(config: Any, parameters: dict[str, Any], max_model_len: int | None) -> None:
    """Frequencies that depend on the longest sequence of a batch let a neighbour's length change
    an answer. Those of longrope change at one length, below which they are fixed."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type in ROPE_TYPES:
        return
    if rope_type not in _OF_THE_LONGEST:
        raise refusal(config, f"its rope type {rope_type!r} is not one that has been checked here")
    hint = ""
    if rope_type == "longrope":
        fixed = parameters["original_max_position_embeddings"]
        if max_model_len is not None and max_model_len <= fixed:
            return
        hint = f" (up to {fixed} tokens it is fixed: set max_model_len to at most that)"
    raise refusal(
        config,
        f"its rope type {rope_type!r} depends on the longest sequence of the batch, so that a "
        f"neighbour's length would change an answer{hint}",
    )
