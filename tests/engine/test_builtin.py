"""The model in the box, whose logits are those of a trained model: near ties, repetition, ends."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mell_ray.builtin import model_path
from mell_ray.config import BUILTIN_SOURCE
from mell_ray.engine import Engine, load_model
from tests.engine.support import drain, generate, request, small_config

OPENINGS = (
    "Once upon a time",
    "What is the capital of France?",
    "The",
    "She opened the letter and read:",
    "one two three four",
)


def test_twenty_texts_at_once_equal_generate() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    reference = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    texts = [opening + " and then" * i for opening in OPENINGS for i in range(4)]
    asked = [tokenizer(text)["input_ids"] for text in texts]
    expected = [generate(reference, prompt, 24) for prompt in asked]
    config = small_config(num_gpu_blocks_override=36, max_num_batched_tokens=32)
    subject = Engine(load_model(BUILTIN_SOURCE, config), config)
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, 24, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(len(asked))] == expected
    assert subject.stats().preemptions > 0
    assert subject.stats().prefix_hit_tokens > 0
