"""Models and tokenizers that are not like the one in the box, through the ingress' own routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mell_ray.config import MellConfig
from mell_ray.errors import ConfigError, UnsupportedModelError
from mell_ray.serving.checks import check_config
from tests.engine.support import TINY
from tests.unit.openai.conftest import CHAT_TEMPLATE, CORPUS, make_byte_level
from tests.unit.serving.inprocess_api import make_api

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["hello", "world"]}},
    "required": ["a"],
    "additionalProperties": False,
}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
HELLO = [{"role": "user", "content": "hello"}]


def make_unigram() -> Any:
    """As T5's: decoded by a rule that tells nothing of a token's bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def without_eos() -> Any:
    backend = make_byte_level().backend_tokenizer
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)


def save(path: Path, tokenizer: Any = None, **config: Any) -> None:
    vocab = TINY["vocab_size"] if tokenizer is None else len(tokenizer)
    torch.manual_seed(1)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**TINY, "vocab_size": vocab, "eos_token_id": 0, **config})
    )
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def llm(path: Path) -> dict[str, Any]:
    loading = {"model_id": "m", "model_source": str(path)}
    return {"model_loading_config": loading, "accelerator_type": "CPU"}


@contextmanager
def served(path: Path) -> Iterator[Callable[..., Any]]:
    """What ``POST /v1/...`` answers."""
    with pytest.MonkeyPatch.context() as patch:
        client = TestClient(make_api(patch, {"llm_configs": [llm(path)]}))
        yield lambda where, **body: client.post(f"/v1/{where}", json={"model": "m", **body})


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [(make_byte_level, [0, 5, 9]), (without_eos, [5])],
    ids=["several", "only the model knows"],
)
def test_the_models_own_end_tokens_end_an_answer_and_are_no_part_of_it(
    tmp_path: Path, tokenizer: Callable[[], Any], ends: list[int]
) -> None:
    """5 and 9 are ordinary text to the tokenizer: ``%`` and ``)``."""
    save(tmp_path, tokenizer(), eos_token_id=ends)
    with served(tmp_path) as post:
        body = {"prompt": "hello", "max_tokens": 200, "seed": 1}
        whole = post("completions", **body, response_format=AS_JSON).raise_for_status()
        choice = whole.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert set(json.loads(choice["text"])) == {"a"}
        forced = {**body, "logit_bias": {"5": 100}, "logprobs": 0}
        choice = post("completions", **forced).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        assert choice["logprobs"]["tokens"] == []
        going_on = post("completions", **forced | {"ignore_eos": True, "max_tokens": 3})
        assert going_on.json()["choices"][0]["text"] == "%%%"


def test_a_model_without_an_end_token_cannot_be_held_to_a_schema(tmp_path: Path) -> None:
    save(tmp_path, make_byte_level(), eos_token_id=None)
    with served(tmp_path) as post:
        answer = post("completions", prompt="hello", response_format=AS_JSON)
    assert answer.status_code == 400
    assert "no end token" in answer.json()["error"]["message"]


def test_a_tokenizer_that_the_grammars_cannot_use(tmp_path: Path) -> None:
    save(tmp_path, make_unigram())
    with served(tmp_path) as post:
        plain = post("completions", prompt="hello world", max_tokens=8, temperature=0)
        assert plain.json()["choices"][0]["text"]
        answer = post("completions", prompt="hello", response_format=AS_JSON)
    assert answer.status_code == 400
    assert "tokenizer cannot be constrained" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ messages[9].role }}", "{{ x("]
)
def test_a_chat_template_that_fails_is_told(tmp_path: Path, template: str) -> None:
    tokenizer = make_byte_level()
    tokenizer.chat_template = template
    save(tmp_path, tokenizer)
    with served(tmp_path) as post:
        answer = post("chat/completions", messages=HELLO)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "chat template" in answer.json()["error"]["message"]


def test_a_directory_without_a_tokenizer_stops_the_start(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ConfigError, match=r"llm_configs\[m\].*the tokenizer of .*tokenizer.json"):
        start(tmp_path)


def test_a_model_that_cannot_run_stops_the_start(tmp_path: Path) -> None:
    make_byte_level().save_pretrained(tmp_path)
    hf.BloomConfig().save_pretrained(tmp_path)  # and it names no length of its context
    with pytest.raises(UnsupportedModelError, match=r"llm_configs\[m\].*model_source: .*'bloom'"):
        start(tmp_path)


def test_a_context_longer_than_the_model_has_positions_stops_the_start(tmp_path: Path) -> None:
    save(tmp_path, make_byte_level())
    with pytest.raises(ConfigError, match=r"llm_configs\[m\].engine_kwargs.max_model_len: .* 256 "):
        start(tmp_path, max_model_len=257)
    start(tmp_path, max_model_len=256)


def test_a_config_of_no_known_model_stops_the_start(tmp_path: Path) -> None:
    make_byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ConfigError, match=r"the config of .*nonesuch"):
        start(tmp_path)


def start(path: Path, **engine_kwargs: Any) -> None:
    """What ``mell-ray serve`` and a deploy do before they start anything."""
    check_config(MellConfig.parse({"llm_configs": [{**llm(path), "engine_kwargs": engine_kwargs}]}))
