"""A Llama with random weights on disk, for benchmarks that do not care what it says."""

from __future__ import annotations

from pathlib import Path


def write_random_llama(directory: Path, max_position_embeddings: int = 8192, seed: int = 0) -> int:
    """About 50 million parameters: hidden 512, 8 layers, 8 heads, 4 of them for KV. Same seed, same
    weights. Returns their number."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return model.num_parameters()
