"""What counts where a request leaves sampling to the model, through the ingress' own routes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from starlette.testclient import TestClient

from mell_ray.config import LLMConfig
from mell_ray.engine import load_model
from mell_ray.serving.model_source import sampling_defaults
from mell_ray.serving.versions import config_hash
from tests.unit.openai.conftest import make_byte_level
from tests.unit.serving.inprocess_api import make_api
from tests.unit.serving.test_other_models import llm, save

GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "do_sample": True}
BODIES = {
    "completions": {"prompt": ["hello", "world"]},
    "chat/completions": {"messages": [{"role": "user", "content": "hello"}], "n": 2},
}


def save_with(path: Path, **defaults: Any) -> None:
    save(path, make_byte_level())
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **defaults}))


def parsed(path: Path, **engine_kwargs: Any) -> LLMConfig:
    return LLMConfig.model_validate({**llm(path), "engine_kwargs": engine_kwargs})


class Api:
    def __init__(self, patch: pytest.MonkeyPatch, path: Path, **engine_kwargs: Any) -> None:
        args = {"llm_configs": [{**llm(path), "engine_kwargs": engine_kwargs}]}
        self._client = TestClient(make_api(patch, args))
        self._ingress: Any = serve.get_replica_context().servable_object

    def texts(self, where: str, **fields: Any) -> list[str]:
        """What each choice says, over HTTP and, the same, over the handle."""
        body = {**BODIES[where], "seed": 1, "ignore_eos": True, **fields}
        answer = self._client.post(f"/v1/{where}", json={"model": "m", **body})
        choices = answer.raise_for_status().json()["choices"]
        call = self._ingress.chat if "messages" in body else self._ingress.completions
        again = asyncio.run(call(body))["choices"]
        assert choices == again
        return [c["text"] if "text" in c else c["message"]["content"] for c in choices]

    def num_tokens(self, **fields: Any) -> int:
        body = {"model": "m", "prompt": "hello", "ignore_eos": True, **fields}
        answer = self._client.post("/v1/completions", json=body).raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])


@contextmanager
def api(path: Path, **engine_kwargs: Any) -> Iterator[Api]:
    with pytest.MonkeyPatch.context() as patch:
        yield Api(patch, path, **engine_kwargs)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the model's defaults say in the log, whether or not our loggers have been set up."""
    logger = logging.getLogger("mell_ray")
    caplog.set_level(logging.INFO, logger="mell_ray")
    logger.addHandler(caplog.handler)
    propagate, logger.propagate = logger.propagate, False
    yield caplog
    logger.propagate = propagate
    logger.removeHandler(caplog.handler)


def test_a_model_s_defaults_count_where_a_request_names_none(tmp_path: Path) -> None:
    save_with(tmp_path, **GREEDY)
    with api(tmp_path, generation_config="vllm") as plain:
        greedy = {where: plain.texts(where, temperature=0, max_tokens=12) for where in BODIES}
        sampled = {where: plain.texts(where, max_tokens=12) for where in BODIES}
    with api(tmp_path) as model:
        for where in BODIES:
            assert greedy[where] != sampled[where]
            assert model.texts(where) == greedy[where]
            assert model.texts(where, temperature=None, max_tokens=None) == greedy[where]
            assert model.texts(where, temperature=1, max_tokens=12) == sampled[where]


def test_the_model_s_output_limit_is_a_default_and_no_bound(tmp_path: Path) -> None:
    save_with(tmp_path, max_new_tokens=5)
    with api(tmp_path) as model:
        assert model.num_tokens() == 5
        assert model.num_tokens(max_tokens=9) == 9
        assert model.num_tokens(min_tokens=7) == 7
        assert model.num_tokens(prompt=[7] * 253) == 3  # the room that is left


def test_what_a_model_brings_is_logged(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    save_with(tmp_path, temperature=0.6, top_k=20, do_sample=False, top_p=None)
    assert sampling_defaults(parsed(tmp_path)).named == {"temperature": 0.6, "top_k": 20}
    [record] = told.records
    assert record.levelno == logging.INFO
    assert "temperature=0.6, top_k=20" in record.getMessage()
    assert sampling_defaults(parsed(tmp_path, generation_config="vllm")).named == {}
    assert len(told.records) == 1


def test_a_value_out_of_range_is_left_out_and_the_model_runs(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """transformers would not load a model with the last two."""
    bad = {"temperature": 7.5, "top_p": "much", "min_p": float("nan"), "top_k": True}
    bad |= {"max_new_tokens": -1, "cache_implementation": "nonesuch"}
    save_with(tmp_path, **bad, repetition_penalty=1.25, eos_token_id=[0, 9])
    with api(tmp_path) as model:
        assert model.num_tokens(max_tokens=3) == 3
    assert sampling_defaults(parsed(tmp_path)).named == {"repetition_penalty": 1.25}
    assert load_model(str(tmp_path)).eos_token_ids == (0, 9)
    warnings = "\n".join(r.getMessage() for r in told.records if r.levelno == logging.WARNING)
    for name in ("temperature", "top_p", "min_p", "top_k", "max_new_tokens"):
        assert f"model m: {name} of {tmp_path}/generation_config.json is left out" in warnings
    assert "repetition_penalty" not in warnings


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', "\xff"])
def test_a_file_that_cannot_be_read_is_told_and_the_model_runs(
    tmp_path: Path, told: pytest.LogCaptureFixture, content: str
) -> None:
    save_with(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    assert sampling_defaults(parsed(tmp_path)).named == {}
    assert load_model(str(tmp_path)).eos_token_ids == (0,)
    assert f"{tmp_path}/generation_config.json is not used" in told.records[0].getMessage()


def test_a_model_without_the_file_has_no_defaults_of_its_own(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    save_with(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert sampling_defaults(parsed(tmp_path)).named == {}
    assert not told.records


def test_replicas_do_not_depend_on_sampling_defaults(tmp_path: Path) -> None:
    """A change replaces the ingress alone."""
    auto, off = parsed(tmp_path), parsed(tmp_path, generation_config="vllm")
    assert config_hash(auto) == config_hash(off)
    assert config_hash(auto) != config_hash(parsed(tmp_path, block_size=8))
