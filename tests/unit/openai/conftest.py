"""Small tokenizers of the two kinds that exist, made here so that no file is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = ["hello world, the café serves naïve £ € 日本語 and emoji 😀👍🏽 stop STOP\n\n"] * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def wrap(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)


def make_byte_level(**kwargs: Any) -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's: tokens are byte strings, no BOS before text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, chat_template=CHAT_TEMPLATE, **kwargs)


def make_sentencepiece(**kwargs: Any) -> PreTrainedTokenizerFast:
    """As Llama 2's: blanks are U+2581, unknown characters fall back to bytes, BOS before text."""
    marks = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    )
    trained = Tokenizer(models.BPE())
    trained.normalizer = marks
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=330, limit_alphabet=30, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>", **kwargs)


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return make_byte_level()


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    return make_sentencepiece()


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)
