"""The int8 KV cache: what it takes, what it answers, and how it moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from mell_kernels import int8, ops
from transformers import DynamicCache

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, LoadedModel, load_model
from mell_ray.engine.kv_pool import KVPool, KVShape, capacity_blocks
from mell_ray.errors import ConfigError, ConflictError
from tests.engine.families import FAMILIES
from tests.engine.support import (
    TINY,
    Client,
    build,
    drain,
    engine,
    prompts,
    request,
    small_config,
    step,
)
from tests.engine.test_migration import commit, move_kv, move_tokens
from tests.engine.test_ops import ragged, token_by_token

PROMPTS = prompts(6, seed=8, longest=40)
LENGTH = 24


def rounded(heads: torch.Tensor) -> torch.Tensor:
    """What a head is after it was stored: whole multiples of a 127th of its largest entry."""
    scale = (heads.abs().amax(dim=-1, keepdim=True) / 127).half().float().clamp_min(2.0**-24)
    return (heads / scale).round().clamp(-127, 127) * scale


class RoundingCache(DynamicCache):
    """transformers' own cache, which keeps what an int8 cache would give back."""

    def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key), rounded(value), *args, **kwargs)


def generate_rounded(model: Any, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=LENGTH,
            do_sample=False,
            pad_token_id=0,
            past_key_values=RoundingCache(config=model.config),
        )
    return output[0, len(prompt) :].tolist()


def int8_engine(**changes: Any) -> Engine:
    return engine(kv_cache_dtype="int8", **changes)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 21), st.integers(1, 9)), min_size=1, max_size=4),
    window=st.sampled_from([None, 3]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_attention_over_codes_is_attention_over_what_they_stand_for(
    lengths: list[tuple[int, int]], window: int | None, with_sinks: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = KVShape(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, int8=True)
    pool = KVPool(shape, 4, 39, torch.device("cpu"))
    meta, tables = ragged(lengths, 40, seed)
    floats = torch.randn(40, *shape.block(4))
    codes, scales = int8.quantize(floats)
    pool.cache.codes.copy_(codes)
    pool.cache.scales.copy_(scales)
    floats = codes.float() * scales.float()[..., None]
    total = len(meta.slot_mapping)
    query, (key, value) = torch.randn(total, 4, 8), torch.randn(2, total, 2, 8)
    options = {
        "scale": 0.3,
        "window": window,
        "softcap": None,
        "sinks": torch.randn(4) if with_sinks else None,
    }
    ops.prepare(pool.cache, meta, ops.Workspace())
    for layer in (2, 0):
        before = pool.tensor.clone()
        ops.write_kv(pool.cache, layer, key, value, meta)
        blocks, offsets = meta.slot_mapping // 4, meta.slot_mapping % 4
        floats[blocks, layer, 0, offsets] = rounded(key)
        floats[blocks, layer, 1, offsets] = rounded(value)
        untouched = sorted(set(range(40)) - set(blocks.tolist()))
        assert torch.equal(pool.tensor[untouched], before[untouched])
        output = ops.paged_attention(query, pool.cache, layer, meta, **options)
        expected = token_by_token(query, floats, layer, lengths, tables, **options)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_close_at_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = (torch.randn(50, 3, 32) * scale).to(dtype)
    codes, scales = int8.quantize(heads)
    back = codes.float() * scales.float()[..., None]
    largest = heads.float().abs().amax(-1, keepdim=True)
    # Half a step, the clipping that a scale rounded down brings, and what float16 cannot resolve.
    assert ((back - heads.float()).abs() <= largest * (0.5 / 127 + 2**-10) + 127 * 2.0**-25).all()


def test_what_is_not_a_number_stays_none() -> None:
    """The sampler ends a request whose logits are not finite; codes must not hide that."""
    codes, scales = int8.quantize(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))
    back = codes.float() * scales.float()[..., None]
    assert back[0].isnan().all()
    assert not back[1].isnan().any()


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma2", "gpt-oss", "qwen3-moe"])
def test_tokens_are_those_of_a_model_whose_cache_rounds(family: str) -> None:
    model = build(FAMILIES[family]())
    model.set_attn_implementation("eager")
    expected = [generate_rounded(model, prompt) for prompt in PROMPTS]
    config = small_config(max_num_batched_tokens=9, kv_cache_dtype="int8")
    subject = Engine(load_model(model, config), config)
    for i, prompt in enumerate(PROMPTS):
        subject.add(request(f"r{i}", prompt, LENGTH, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(len(PROMPTS))] == expected


@pytest.fixture(scope="module")
def undisturbed() -> Client:
    subject = int8_engine(num_gpu_blocks_override=200)
    for i, prompt in enumerate(PROMPTS):
        subject.add(request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True))
    return drain(subject)


def test_int8_is_not_just_the_float_cache(undisturbed: Client) -> None:
    subject = engine(num_gpu_blocks_override=200)
    for i, prompt in enumerate(PROMPTS):
        subject.add(request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True))
    assert drain(subject).tokens != undisturbed.tokens


@pytest.mark.parametrize("stages", [0, 3])
@pytest.mark.parametrize("mode", ["kv", "token"])
def test_a_request_that_moves_gives_the_same_tokens(
    undisturbed: Client, mode: str, stages: int
) -> None:
    """Under preemption on both sides, and with prefixes in the cache."""
    engines = [int8_engine(num_gpu_blocks_override=30) for _ in range(2)]
    client = Client()
    for i, prompt in enumerate(PROMPTS):
        engines[0].add(request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True))
    while len(client.tokens.get("r0", [])) < 3:
        step(engines, client)
    move = move_kv if mode == "kv" else move_tokens
    move(engines[0], engines[1], "r0", client, stages)
    assert engines[1].generation_of("r0") == 1
    drain(engines, client)
    assert client.tokens == undisturbed.tokens
    assert engines[0].stats().preemptions > 0


def test_a_cached_prefix_is_used(undisturbed: Client) -> None:
    subject = int8_engine(num_gpu_blocks_override=200)
    longest = max(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    for name in ("a", "b"):
        subject.add(request(name, PROMPTS[longest], LENGTH, ignore_eos=True))
        assert drain(subject).tokens[name] == undisturbed.tokens[f"r{longest}"]
    assert subject.stats().prefix_hit_tokens >= len(PROMPTS[longest]) // 4 * 4 - 4


def test_blocks_travel_bit_for_bit() -> None:
    src, dst = int8_engine(), int8_engine()
    src.add(request("r", PROMPTS[0][:1] * 13, LENGTH))
    src.step()
    data = src.export_blocks("r", 0, 4)
    dst.reserve("m", src.peek_state("r"), prefill=False)
    dst.import_blocks("m", 0, data)
    src.freeze("r")
    dst.activate("m", src.peek_state("r"))
    assert (dst.export_blocks("r", 0, 4) == data).all()


@pytest.mark.parametrize("kinds", [("int8", "auto"), ("auto", "int8")])
def test_blocks_of_another_kind_are_refused_and_tokens_are_not(kinds: tuple[str, str]) -> None:
    src, dst = (engine(kv_cache_dtype=kind) for kind in kinds)
    client = Client()
    src.add(request("r", PROMPTS[0], LENGTH, ignore_eos=True))
    for _ in range(4):
        step([src], client)
    for prefill in (False, True):
        with pytest.raises(ConflictError, match=r"int8=\w+.*int8=\w+.*migrate its tokens"):
            dst.reserve("m", src.peek_state("r"), prefill=prefill, imports=True)
    dst.check()
    assert dst.stats().used_blocks == 0
    dst.reserve("m", src.peek_state("r"), prefill=True)
    commit(src, dst, "m", src.freeze("r"))
    drain([src, dst], client)
    assert len(client.tokens["r"]) == LENGTH
    # From its new place it moves on as one of that kind.
    src.add(request("s", PROMPTS[0], LENGTH, ignore_eos=True))
    step([src], client)
    dst.reserve("n", src.peek_state("s"), prefill=True)
    commit(src, dst, "n", src.freeze("s"))
    third = engine(kv_cache_dtype=kinds[1])
    move_kv(dst, third, "s", client, 1)
    assert third.generation_of("s") == 2


def test_the_two_kinds_share_no_prefix_hash() -> None:
    assert engine().prefix_root != int8_engine().prefix_root


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_the_bytes_of_half_precision(dtype: torch.dtype) -> None:
    """Of heads of 64, with scales: 66 bytes where 16 bits take 128."""
    shape = KVShape(num_layers=4, num_kv_heads=2, head_dim=64, dtype=dtype)
    stored = shape.stored_as("int8")
    assert stored.block_nbytes(16) * dtype.itemsize * 64 == shape.block_nbytes(16) * 66
    config = EngineConfig(kv_cache_memory_bytes=1 << 22)
    many, few = (capacity_blocks(each, config, 1 << 22) for each in (stored, shape))
    assert many / few > 1.93 * dtype.itemsize / 2
    pool = KVPool(stored, 16, 3, torch.device("cpu"))
    assert pool.export([2]).nbytes == stored.block_nbytes(16)


@pytest.mark.parametrize(("heads", "dim", "block"), [(1, 5, 1), (3, 7, 3), (2, 8, 4)])
def test_any_shape_of_block_is_whole(heads: int, dim: int, block: int) -> None:
    """Sizes that leave the scales off their alignment are padded, and nothing overlaps."""
    shape = KVShape(1, heads, dim, torch.float32, int8=True)
    pool = KVPool(shape, block, 2, torch.device("cpu"))
    pool.cache.codes[1].fill_(1)
    pool.cache.scales[1].fill_(2.0)
    assert (pool.cache.codes[1] == 1).all()
    assert not pool.tensor[[0, 2]].any()
    assert pool.block_nbytes % 16 == 0


def test_latents_are_refused_by_name() -> None:
    config = small_config(kv_cache_dtype="int8")
    loaded = load_model(build(FAMILIES["deepseek-v3"]()), config)
    with pytest.raises(ConfigError, match="latent attention") as error:
        Engine(loaded, config)
    assert error.value.param == "kv_cache_dtype"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_with_codes(dtype: str) -> None:
    model: LoadedModel = load_model(
        build(hf.LlamaConfig(**TINY)).to(getattr(torch, dtype)), small_config()
    )
    subject = Engine(model, small_config(kv_cache_dtype="int8"))
    subject.add(request("r", [5, 6, 7], 10, ignore_eos=True, temperature=1.0))
    assert len(drain(subject).tokens["r"]) == 10
