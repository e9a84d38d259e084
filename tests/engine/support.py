"""Tiny random models, their reference output, and a loop that drives engines and reads deltas."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, LoadedModel, load_model
from mell_ray.engine.types import RequestState, SamplingParams, TokenDelta, TokenLogprobs

VOCAB = 128
EOS = 1
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def build(config: Any) -> PreTrainedModel:
    """The same random weights for the same config, however often."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def reference() -> PreTrainedModel:
    return build(LlamaConfig(**TINY))


@cache
def tiny() -> LoadedModel:
    return load_model(build(LlamaConfig(**TINY)), small_config())


def small_config(**changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 64,
    }
    return EngineConfig(**{**settings, **changes})


def engine(**changes: Any) -> Engine:
    return Engine(tiny(), small_config(**changes))


def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy output, which includes the EOS token where it comes."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
    return output[0, len(prompt) :].tolist()


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def request(
    name: str, prompt: list[int], max_tokens: int = 20, arrival_s: float = 0.0, **sampling: Any
) -> RequestState:
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling})
    return RequestState(name, list(prompt), params, arrival_s=arrival_s)


class Client:
    """What an ingress knows: it orders by (generation, index) and drops what it already has."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.finished: dict[str, str] = {}
        self.errors: dict[str, str | None] = {}

    def read(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            name = delta.request_id
            have = self.tokens.setdefault(name, [])
            assert name not in self.finished, f"{name} emits after its end"
            assert delta.index <= len(have), f"{name} has a gap"
            overlap = len(have) - delta.index
            assert delta.token_ids[:overlap] == have[delta.index :], f"{name} took a token back"
            have += delta.token_ids[overlap:]
            if delta.logprobs is not None:
                assert len(delta.logprobs) == len(delta.token_ids)
                self.logprobs.setdefault(name, []).extend(delta.logprobs[overlap:])
            if delta.finish_reason is not None:
                self.finished[name] = delta.finish_reason
                self.errors[name] = delta.error


def step(engines: Iterable[Engine], client: Client) -> None:
    for each in engines:
        output = each.step()
        each.check()
        names = [delta.request_id for delta in output.deltas]
        assert len(names) == len(set(names)), "two deltas of one request in a step"
        client.read(output.deltas)


def drain(engines: Engine | list[Engine], client: Client | None = None) -> Client:
    """Step until nobody has work; every step must do or say something."""
    group = [engines] if isinstance(engines, Engine) else engines
    client = client or Client()
    for _ in range(5000):
        if not any(each.has_work() for each in group):
            return client
        step(group, client)
    raise AssertionError("the engines never finish")


def wait_for(condition: Callable[[], bool]) -> None:
    """Until ``condition`` holds; fails after two minutes."""
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)
