"""A Llama with random weights on disk, for benchmarks that do not care what it says."""

from __future__ import annotations

from pathlib import Path


def write_random_llama(directory: Path, max_position_embeddings: int = 8192) -> None:
    """About 50 million parameters: hidden 512, 8 layers, 8 heads, 4 of them for KV."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
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
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
