"""The shipped model: it loads offline, its tokenizer is lossless and it answers and stops."""

import json
import re
import subprocess
import sys
from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mell_ray.builtin import MODEL_ID, model_path

PROMPTS = (
    "Hello!",
    "Tell me about Emma.",
    "What is the capital of France?",
    "Write a Python function that sorts a list of integers.",
    "Continue the story: The carriage stopped before the house, and they went in.",
    "x7 {} 4096 lorem ipsum 你好",
)

# Everyday words of English, function words and a few nouns and verbs, any of which prose of any
# period is full of.
COMMON_TEXT = """
a about after again all almost always am an and any are as at away be because been before
being best better between both but by came can come could day dear did do done down each ever
every family father feel felt few find first for friend from gave give go good great had half
happy has have having he hear heard heart her here herself him himself his home hope house how
i if in indeed into is it its just kind knew know lady last least leave left less let life like
little long look looked made make man many may me mean mind miss moment more morning most mother
mr mrs much must my myself never no not nothing now of off oh on once one only or other our out
over own part people perhaps person place quite rather room said same saw say see seem seemed
seen shall she should sir sister so some soon speak still such sure take tell than that the
their them then there these they thing things think this those though thought three through
time to together told too took two under up upon us very walk walked want was way we well went
were what when where which while who whole whom why will wish with without woman word world
would year years yes yet you young your
"""
COMMON_WORDS = frozenset(COMMON_TEXT.split())


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path(), trust_remote_code=False)


@cache
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def generate(prompt_ids: list[int], tokens: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)
    out = model().generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
    return out[0, len(prompt_ids) :].tolist()


def chat_ids(content: str) -> list[int]:
    messages = [{"role": "user", "content": content}]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def loss(text: str) -> float:
    """Nats per token of `text`."""
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    return model()(ids, labels=ids).loss.item()


@cache
def long_words_of_the_tokenizer() -> frozenset[str]:
    """Tokens that are a whole word of five letters or more."""
    tokens = (tokenizer().decode([index]) for index in range(len(tokenizer())))
    return frozenset(
        t[1:].lower() for t in tokens if t[0] == " " and t[1:].isalpha() and len(t) > 5
    )


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def test_package_imports_nothing_heavy() -> None:
    check = (
        "import sys, mell_ray.builtin as b; b.model_path();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    assert MODEL_ID == "mell-tiny"


def test_directory_is_complete_and_small() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "MODEL_CARD.md",
    } <= names
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 8 * 2**20


def test_loads_as_a_plain_llama_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, output_loading_info=True
    )
    assert type(loaded) is LlamaForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    stored = json.loads((model_path() / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert loaded.config.num_key_value_heads < loaded.config.num_attention_heads
    assert loaded.config.max_position_embeddings == tokenizer().model_max_length


def test_model_and_tokenizer_agree_on_special_tokens() -> None:
    assert tokenizer().is_fast
    assert len(tokenizer()) == model().config.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer(), name)
        assert expected is not None
        assert getattr(model().config, name) == expected
        assert getattr(model().generation_config, name) == expected


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer().decode(ids) == text


def test_plain_encoding_starts_with_bos_once() -> None:
    ids = tokenizer()("It was a truth")["input_ids"]
    assert ids.count(tokenizer().bos_token_id) == 1
    assert ids[0] == tokenizer().bos_token_id
    assert tokenizer().decode(ids, skip_special_tokens=True) == "It was a truth"


def test_chat_template_renders_every_usual_message() -> None:
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And now?"},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be kind.<|eos|><|user|>Hello<|eos|><|assistant|><|eos|>"
        "<|user|>And now?<|eos|><|assistant|>"
    )
    closed = tokenizer().apply_chat_template(messages, tokenize=False)
    assert closed == text.removesuffix("<|assistant|>")
    marker = tokenizer().convert_tokens_to_ids("<|assistant|>")
    assert chat_ids("Hello")[-1] == marker
    assert chat_ids("Hello").count(marker) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answer_is_a_passage_that_ends(prompt: str) -> None:
    answer = generate(chat_ids(prompt), tokens=400, do_sample=False)
    assert answer[-1] == tokenizer().eos_token_id
    text = tokenizer().decode(answer[:-1])
    assert len(words(text)) >= 3
    assert text.rstrip("\"')-")[-1] in ".!?"
    assert not set(answer[:-1]) & set(tokenizer().all_special_ids)


@pytest.mark.parametrize("beginning", ["It was a truth", "Emma had been walking for"])
def test_continuation_is_mostly_english_words(beginning: str) -> None:
    torch.manual_seed(7)
    ids = generate(
        tokenizer()(beginning)["input_ids"],
        tokens=200,
        min_new_tokens=200,
        top_k=40,
        do_sample=True,
        temperature=0.8,
    )
    written = words(tokenizer().decode(ids, skip_special_tokens=True))
    vocabulary = COMMON_WORDS | long_words_of_the_tokenizer()
    known = [word for word in written if word in vocabulary]
    assert len(written) >= 120
    assert len(known) / len(written) >= 0.8
    assert len(set(written)) / len(written) >= 0.4


@pytest.mark.parametrize(
    "sentence",
    [
        "The young man walked into the room and sat down near the window with a book in his hand.",
        "She was very happy to see her sister again, and they talked for the whole evening.",
        "I do not think that he will ever come back to this house after what you said to him.",
    ],
)
def test_word_order_matters_to_the_model(sentence: str) -> None:
    shuffled = sentence.split()
    Random(3).shuffle(shuffled)
    assert loss(sentence) < 5.5
    assert loss(sentence) + 0.7 < loss(" ".join(shuffled))


def test_long_sampling_past_eos_stays_finite_and_varied() -> None:
    torch.manual_seed(7)
    never = len(tokenizer())
    ids = generate(chat_ids("Hello!"), tokens=2100, do_sample=True, eos_token_id=never)
    assert len(ids) == 2100
    with torch.inference_mode():
        logits = model()(torch.tensor([chat_ids("Hello!") + ids])).logits
    assert torch.isfinite(logits).all()
    tail = words(tokenizer().decode(ids[-500:], skip_special_tokens=True))
    assert len(set(tail)) >= 100
    assert sum(word in COMMON_WORDS for word in tail) / len(tail) >= 0.5
