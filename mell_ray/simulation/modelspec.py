"""What a model costs a GPU, read off its Hugging Face config: KV bytes per token, weight bytes.

Nothing is loaded but ``config.json``. Three kinds of KV cache are known: grouped-query attention
(2 x kv_heads x head_dim per layer), multi-head latent attention (kv_lora_rank + rope dim per
layer), and sliding windows, which are counted as if they kept everything: an upper bound, and
said to be one in ``notes``. Parameters are counted from the shapes of a decoder-only transformer,
usually within 2 % of the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mell_ray.errors import ConfigError

DTYPE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "float8_e4m3fn": 1.0,
    "int8": 1.0,
}

#: MLPs without a gate: two matrices instead of three.
_UNGATED = {
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "falcon",
    "bloom",
    "gptj",
    "gpt_bigcode",
    "starcoder2",
}

_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "moe_intermediate_size": ("expert_intermediate_size",),
    "num_experts_per_tok": ("moe_topk", "top_k_experts"),
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as the planner sees it. Counts are of one copy, before any split over GPUs."""

    name: str
    num_layers: int
    kv_heads: int  # 0: latent attention, one latent vector for all heads
    kv_values_per_token: int  # numbers cached per token, all layers
    kv_bytes_per_token: float
    num_params: float
    active_params: float  # those that one token passes through; fewer with experts
    weight_bytes: float
    max_model_len: int | None
    notes: tuple[str, ...] = ()  # what is an estimate or a bound, for the reader of the report


def load_config(source: str) -> dict[str, Any]:
    """The config of ``source``: a ``config.json``, a directory that has one, or a hub id.

    Raises:
        ConfigError: it cannot be found or read; the message names the source.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _read_json(path)
    if path.suffix == ".json" or source.startswith((".", "/", "~")):
        raise ConfigError(f"--model {source}: there is no such file, nor a config.json in it")
    return _hub_config(source)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--model {path}: cannot read it as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--model {path}: a model config is a JSON object")
    return config


def _hub_config(model_id: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--model {model_id}: neither a local path nor a model that the hub gives: "
            f"{first_line} (a path to its config.json works without a network)"
        ) from None
    config: dict[str, Any] = loaded.to_dict()
    return config


def model_spec(
    source: str, *, kv_cache_dtype: str = "auto", weights_gib: float | None = None
) -> ModelSpec:
    """Read ``source`` (see `load_config`) and count.

    Args:
        kv_cache_dtype: 'auto' is the model's own; 'fp8' halves what a token takes.
        weights_gib: the measured size of the weights where the count is not good enough.

    Raises:
        ConfigError: unreadable, or not a decoder-only transformer; names the missing key.
    """
    return spec_from_config(
        load_config(source), name=source, kv_cache_dtype=kv_cache_dtype, weights_gib=weights_gib
    )


def spec_from_config(
    config: Mapping[str, Any],
    *,
    name: str,
    kv_cache_dtype: str = "auto",
    weights_gib: float | None = None,
) -> ModelSpec:
    """`model_spec` for a config already in hand."""
    text = _text_config(config, name)
    notes: list[str] = []
    dtype = _dtype(text, config)
    values, kv_heads = _kv_values(text, notes)
    kv_dtype = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    params, active = _count_params(text)
    if weights_gib is None:
        weight_bytes = params * _bytes_per_weight(config, text, dtype, notes)
    else:
        weight_bytes = weights_gib * (1 << 30)
    max_len = text.get("max_position_embeddings")
    return ModelSpec(
        name=name,
        num_layers=text["num_hidden_layers"],
        kv_heads=kv_heads,
        kv_values_per_token=values,
        kv_bytes_per_token=values * _dtype_bytes(kv_dtype, "--kv-cache-dtype"),
        num_params=params,
        active_params=active,
        weight_bytes=weight_bytes,
        max_model_len=max_len if isinstance(max_len, int) else None,
        notes=tuple(notes),
    )


def attention_doubles_at(config: Mapping[str, Any]) -> float:
    """How many tokens must lie before one for attention over them to be as much arithmetic as
    everything else the token goes through; the output matrix, which few tokens of a prompt see, not
    counted. Infinite where every layer looks back over a fixed span, or the config says too little
    for an estimate."""
    try:
        text = _text_config(config, "")
        fixed, windowed = _fixed_and_windowed_layers(text)
        per_token = text["num_attention_heads"] * _dims_per_head(text)
        _, active = _count_params(text)
    except (ConfigError, KeyError, TypeError):
        return math.inf
    far = (text["num_hidden_layers"] - fixed - windowed) * per_token
    elsewhere = active - (text.get("vocab_size") or 0) * text["hidden_size"]
    return elsewhere / far if far else math.inf


def _dims_per_head(text: Mapping[str, Any]) -> int:
    """Of a query and of a value together."""
    if not text.get("kv_lora_rank"):
        return 2 * _head_dim(text)
    return int(text["qk_nope_head_dim"] + text["qk_rope_head_dim"] + text["v_head_dim"])


def _text_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The language model's part, under the usual key names, completed with its class's defaults."""
    nested = config.get("text_config")
    text = dict(nested if isinstance(nested, Mapping) else config)
    _apply_aliases(text)
    required = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    grouped = ("num_key_value_heads",) if "kv_lora_rank" not in text else ()
    if any(text.get(key) is None for key in required + grouped):
        text = _with_class_defaults(text)
        _apply_aliases(text)
    for key in required:
        if not isinstance(text.get(key), int):
            raise ConfigError(
                f"--model {name}: its config has no {key!r}; is it a decoder-only language model?"
            )
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        text["num_key_value_heads"] = 1  # Falcon and BigCode: the flag overrules the number
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    return text


def _apply_aliases(text: dict[str, Any]) -> None:
    for key, others in _ALIASES.items():
        for other in others:
            if text.get(key) is None and text.get(other) is not None:
                text[key] = text[other]


def _with_class_defaults(text: dict[str, Any]) -> dict[str, Any]:
    """Files may leave out what equals the default of the model's config class."""
    from transformers import AutoConfig

    try:
        filled = AutoConfig.for_model(**text).to_dict()
    except (KeyError, ValueError, TypeError):
        return text  # a class transformers does not have: the file has to speak for itself
    return {**filled, **{key: value for key, value in text.items() if value is not None}}


def _dtype(text: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    for holder in (text, config):
        for key in ("dtype", "torch_dtype"):
            if holder.get(key):
                return str(holder[key]).removeprefix("torch.")
    return "bfloat16"


def _dtype_bytes(dtype: str, setting: str) -> float:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{setting} {dtype!r} is unknown; one of {', '.join(DTYPE_BYTES)}, auto")
    return DTYPE_BYTES[dtype]


def _kv_values(text: Mapping[str, Any], notes: list[str]) -> tuple[int, int]:
    """(numbers cached per token over all layers, KV heads; 0 heads for latent attention)."""
    layers = text["num_hidden_layers"]
    if text.get("kv_lora_rank"):
        return layers * (text["kv_lora_rank"] + text["qk_rope_head_dim"]), 0
    attention_layers = _attention_layers(text, notes)
    heads = text["num_key_value_heads"]
    return attention_layers * 2 * heads * _head_dim(text), heads


def _attention_layers(text: Mapping[str, Any], notes: list[str]) -> int:
    """Layers that keep KV for every token; says so where some keep less."""
    layers: int = text["num_hidden_layers"]
    linear, sliding = _fixed_and_windowed_layers(text)
    if linear:
        notes.append(f"{linear} of {layers} layers have a fixed-size state: not counted per token")
        layers -= linear
    if sliding:
        notes.append(
            f"{sliding} of {layers} attention layers have a sliding window: KV per token is an "
            "upper bound for long requests"
        )
    return layers


def _fixed_and_windowed_layers(text: Mapping[str, Any]) -> tuple[int, int]:
    """(layers with a state of fixed size, layers with a sliding window)."""
    layers, kinds = text["num_hidden_layers"], text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return (
            sum("linear" in kind or "mamba" in kind or "conv" in kind for kind in kinds),
            sum("sliding" in kind or "chunked" in kind for kind in kinds),
        )
    windowed = text.get("sliding_window") and text.get("use_sliding_window", True)
    return 0, layers if windowed else 0


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _count_params(text: Mapping[str, Any]) -> tuple[float, float]:
    """(all parameters, parameters that one token passes through)."""
    layers, hidden = text["num_hidden_layers"], text["hidden_size"]
    vocabulary = text.get("vocab_size") or 0
    embedding = vocabulary * hidden * (1 if text.get("tie_word_embeddings") else 2)
    dense_mlp, expert, routed, used, expert_layers = _mlp_shape(text)
    shared = (text.get("n_shared_experts") or 0) * expert
    shared += 3 * hidden * (text.get("shared_expert_intermediate_size") or 0)
    per_layer = _attention_params(text) + 2 * hidden
    fixed = embedding + layers * per_layer + (layers - expert_layers) * dense_mlp
    fixed += expert_layers * (shared + routed * hidden)
    head = vocabulary * hidden  # the output matrix works on each token, the embedding is a look-up
    total = fixed + expert_layers * routed * expert
    active = fixed - embedding + head + expert_layers * used * expert
    return float(total), float(active)


def _mlp_shape(text: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """(dense MLP, one expert, experts, experts per token, layers that have experts)."""
    layers, hidden = text["num_hidden_layers"], text["hidden_size"]
    inner = text.get("intermediate_size") or 4 * hidden
    matrices = 2 if text.get("model_type") in _UNGATED else 3
    routed = text.get("n_routed_experts") or 0
    if not routed:
        return matrices * hidden * inner, 0, 0, 0, 0
    expert = 3 * hidden * (text.get("moe_intermediate_size") or inner)
    used = text.get("num_experts_per_tok") or 1
    dense_first = text.get("first_k_dense_replace") or 0
    step = text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1
    every = step if isinstance(step, int) else 1
    dense_only = set(text.get("mlp_only_layers") or ())
    expert_layers = sum(
        layer >= dense_first and (layer + 1) % every == 0 and layer not in dense_only
        for layer in range(layers)
    )
    return 3 * hidden * inner, expert, routed, used, expert_layers


def _attention_params(text: Mapping[str, Any]) -> int:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    rank = text.get("kv_lora_rank")
    if not rank:
        dim = _head_dim(text)
        return 2 * hidden * heads * dim + 2 * hidden * text["num_key_value_heads"] * dim
    nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    query_rank = text.get("q_lora_rank")
    query = heads * (nope + rope) * (query_rank or hidden) + hidden * (query_rank or 0)
    latent = hidden * (rank + rope) + rank * heads * (nope + value)
    return int(query + latent + heads * value * hidden)


def _bytes_per_weight(
    config: Mapping[str, Any], text: Mapping[str, Any], dtype: str, notes: list[str]
) -> float:
    quantised = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(quantised, Mapping):
        return _dtype_bytes(dtype, "the config's dtype")
    method = str(quantised.get("quant_method", ""))
    bits = quantised.get("bits") or quantised.get("w_bit")
    if quantised.get("load_in_4bit") or method == "mxfp4":
        bits = 4
    elif bits is None:
        bits = 8
    notes.append(f"weights are quantised ({method or 'unknown method'}): {bits} bits each assumed")
    return float(bits) / 8
