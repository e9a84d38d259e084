"""The whole engine on the Triton kernels: the same tokens as transformers, and as plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from mell_kernels import ops

from mell_ray.engine import Engine, LoadedModel, load_model
from tests.engine.support import (
    TINY,
    build,
    drain,
    generate,
    prompts,
    request,
    small_config,
    tiny,
)
from tests.kernels.conftest import Run

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**TINY),
    "gemma2": lambda: hf.Gemma2Config(
        **{**TINY, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **{
            **TINY,
            "head_dim": 8,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
        }
    ),
}


@contextmanager
def on_kernels(device: str) -> Iterator[None]:
    """Under the interpreter the kernels take CPU tensors, which ``ops`` gives to plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(ops, "_has_kernels", lambda _: True)
        yield


def greedy(model: LoadedModel, asked: list[list[int]], **settings: Any) -> list[list[int]]:
    config = small_config(max_num_batched_tokens=16, **settings)
    subject = Engine(model, config, model.device.type)
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, max_tokens=4))
    told = drain(subject).tokens
    return [told[f"r{i}"] for i in range(len(asked))]


def check_greedy(device: str, family: str) -> None:
    asked = prompts(2, longest=20)
    plain = build(CONFIGS[family]())
    model = load_model(build(CONFIGS[family]()), small_config(), device)
    with on_kernels(device):
        told = greedy(model, asked)
    assert told == [generate(plain, prompt, 4) for prompt in asked]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_transformers(run: Run, family: str) -> None:
    run(check_greedy, family)


def check_load(device: str) -> None:
    """The comparison with a plain forward, which every model must pass, passes on the kernels."""
    with on_kernels(device):
        load_model(build(CONFIGS["llama"]()), small_config(), device)


def test_a_model_passes_its_self_check(run: Run) -> None:
    run(check_load)


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 20, "seed": 2, "logprobs": 2},
    {"temperature": 1.5, "top_p": 0.8, "min_p": 0.05, "seed": 3},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3, "logit_bias": ((5, 3.0),)},
]


def sampled(model: LoadedModel) -> tuple[dict[str, list[int]], list[int]]:
    asked = prompts(len(SAMPLINGS), seed=3, longest=6)
    subject = Engine(model, small_config(), model.device.type)
    for i, (prompt, params) in enumerate(zip(asked, SAMPLINGS, strict=True)):
        subject.add(request(f"r{i}", prompt, max_tokens=2, ignore_eos=True, **params))
    client = drain(subject)
    tops = [token for entry in client.logprobs["r0"] for token, _ in entry.top]
    return client.tokens, tops


def check_sampled(device: str) -> None:
    expected = sampled(tiny())
    model = load_model(build(CONFIGS["llama"]()), small_config(), device)
    with on_kernels(device):
        assert sampled(model) == expected


def test_the_same_tokens_are_sampled_as_on_a_cpu(run: Run) -> None:
    run(check_sampled)


def check_migration(device: str) -> None:
    """A request that moved, KV and all, goes on with the tokens of one that stayed."""
    settings = small_config()
    prompt = prompts(1, seed=5, longest=12)[0]
    asked = request("moving", prompt, max_tokens=4, temperature=1.0, seed=9, ignore_eos=True)
    model = load_model(build(CONFIGS["llama"]()), settings, device)
    with on_kernels(device):
        src, dst, stays = (Engine(model, settings, device) for _ in range(3))
        for each in (src, stays):
            each.add(asked)
        expected = drain(stays).tokens
        src.step()
        src.step()
        dst.reserve("m", src.peek_state("moving"), prefill=False)
        state = src.freeze("moving")
        blocks = -(-state.num_computed // settings.block_size)
        dst.import_blocks("m", 0, src.export_blocks("moving", 0, blocks))
        dst.activate("m", state)
        src.release("moving")
        assert dst.progress("moving") == (state.num_tokens, state.num_computed)
        assert drain(dst).tokens == expected


def test_blocks_move_between_engines(run: Run) -> None:
    run(check_migration)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", CONFIGS)
def test_graphs_change_nothing(family: str) -> None:
    asked = prompts(6, seed=7, longest=40)
    model = load_model(build(CONFIGS[family]()), small_config(), "cuda")
    plain = greedy(model, asked, enforce_eager=True)
    assert greedy(model, asked, enforce_eager=False) == plain
