"""A tiny random configuration of every model family that the engine takes, with whatever is special
about the family's attention switched on."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.engine.support import TINY

WIDE = {**TINY, "head_dim": 16}
HALF_DIM = {**WIDE, "num_key_value_heads": 1}
MOE = {**WIDE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = {"sliding_window": 8}

FAMILIES: dict[str, Any] = {
    "llama2": lambda: hf.LlamaConfig(**{**TINY, "num_key_value_heads": 4}, attention_bias=True),
    "llama-tied": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama3": lambda: hf.LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama-yarn": lambda: hf.LlamaConfig(**TINY, rope_parameters=YARN),
    "llama-linear": lambda: hf.LlamaConfig(**TINY, rope_parameters=LINEAR),
    "mistral": lambda: hf.MistralConfig(**TINY, **SLIDING),
    "mistral-full": lambda: hf.MistralConfig(**TINY, sliding_window=None),
    "mixtral": lambda: hf.MixtralConfig(**TINY, **SLIDING, num_local_experts=4),
    "qwen2": lambda: hf.Qwen2Config(**TINY),
    "qwen2-sliding": lambda: hf.Qwen2Config(
        **TINY, **SLIDING, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**MOE, num_experts=4),
    "gemma": lambda: hf.GemmaConfig(**HALF_DIM, tie_word_embeddings=False),
    "gemma2": lambda: hf.Gemma2Config(
        **WIDE,
        **SLIDING,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **{**WIDE, "num_hidden_layers": 3},
        **SLIDING,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    ),
    "phi": lambda: hf.PhiConfig(**TINY),
    "phi3": lambda: hf.Phi3Config(**TINY, **SLIDING),
    "granite": lambda: hf.GraniteConfig(**TINY, attention_multiplier=0.2, logits_scaling=2.0),
    "olmo2": lambda: hf.Olmo2Config(**TINY),
    "olmo3": lambda: hf.Olmo3Config(**{**TINY, "num_hidden_layers": 4}, **SLIDING),
    "cohere2": lambda: hf.Cohere2Config(**{**TINY, "num_hidden_layers": 4}, **SLIDING),
    "smollm3": lambda: hf.SmolLM3Config(**TINY, no_rope_layers=[1, 0]),
    "starcoder2": lambda: hf.Starcoder2Config(**TINY, **SLIDING),
    "glm4": lambda: hf.Glm4Config(**WIDE),
    "gpt-oss": lambda: hf.GptOssConfig(
        **WIDE, **SLIDING, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN
    ),
    "deepseek-v2": lambda: hf.DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**LATENT, q_lora_rank=16, rope_parameters=YARN),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{**TINY, "num_key_value_heads": 4}),
    "gpt2": lambda: hf.GPT2Config(**GPT2, initializer_range=0.3, eos_token_id=1, bos_token_id=0),
    "opt": lambda: hf.OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        init_std=0.3,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    ),
}
