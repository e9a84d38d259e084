"""The fused Llama block: where it is used, and that it is the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from mell_kernels import linear as kernels
from mell_kernels import narrow, screen
from mell_kernels.linear import Bound, Linear, add_narrow, can_pack, padded_rows

from mell_ray.engine import Engine, fused, load_model
from mell_ray.engine.weight_image import WeightImage
from tests.engine.support import (
    TINY,
    build,
    drain,
    generate,
    prompts,
    request,
    small_config,
    wait_for,
)

WIDE = {**TINY, "head_dim": 16}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**TINY),
    "llama-biased": lambda: hf.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-scaled-rope": lambda: hf.LlamaConfig(
        **TINY,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: hf.MistralConfig(**TINY, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(**TINY),
    "qwen2-windowed": lambda: hf.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "phi3": lambda: hf.Phi3Config(**TINY, sliding_window=8),
    "granite": lambda: hf.GraniteConfig(
        **TINY,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=5.0,
    ),
    "smollm3": lambda: hf.SmolLM3Config(**TINY, no_rope_layers=[1, 0]),
    "gemma": lambda: hf.GemmaConfig(**WIDE),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_same_tokens_as_transformers(name: str) -> None:
    model = build(CONFIGS[name]())
    for parameter in model.parameters():  # norms of one and biases of zero would prove nothing
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.set_attn_implementation("eager")
    asked = prompts(4, seed=2, longest=30)
    expected = [generate(model, prompt, 20) for prompt in asked]
    config = small_config(max_num_batched_tokens=11, max_num_seqs=4)
    loaded = load_model(model, config)
    assert loaded.fused is not None
    subject = Engine(loaded, config)
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, 20, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(4)] == expected


needs_screen = pytest.mark.skipif(
    not screen.is_possible(torch.empty(1 << 11, 1 << 11)), reason="needs AVX512-VNNI"
)


@needs_screen
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_likeliest_token_without_most_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: torch.dtype
) -> None:
    """The same tokens, alone and beside a request that wants other logits; also from an image. In
    bfloat16 only the first is as certain as its logits differ."""
    length = 6 if dtype == torch.float32 else 1
    made = {**TINY, "vocab_size": 4000, "tie_word_embeddings": tied}
    model = build(hf.LlamaConfig(**made)).to(dtype)
    expected = [generate(model.double(), prompt, length) for prompt in prompts(3, seed=2)]
    model.to(dtype)
    monkeypatch.setattr(screen, "_SMALLEST", 1)
    monkeypatch.setattr(fused, "COPY_AFTER_S", 0.0)
    loaded = load_model(model, small_config())
    found = WeightImage.of(loaded, "mell-weights-screen", 1 << 30).load()
    told: list[int] = []

    def noted(self: screen.Screen, x: torch.Tensor) -> torch.Tensor | None:
        ids = likeliest(self, x)
        told.append(0 if ids is None else len(ids))
        return ids

    likeliest = screen.Screen.likeliest
    monkeypatch.setattr(screen.Screen, "likeliest", noted)
    for each in (loaded, found):
        wait_for(lambda each=each: each.fused._screen is not None)
        for other in (False, True):
            subject = Engine(each, small_config())
            for i, prompt in enumerate(prompts(3, seed=2)):
                subject.add(request(f"r{i}", prompt, length, arrival_s=i))
            if other:
                subject.add(request("other", prompts(1, seed=9)[0], 1, temperature=1.0))
            told.clear()
            client = drain(subject)
            assert [client.tokens[f"r{i}"] for i in range(3)] == expected
            assert sum(told) == 3 * length or other


def test_without_memory_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_SMALLEST", 1)
    monkeypatch.setattr(fused, "free_bytes", lambda: 0)
    loaded = load_model(build(hf.LlamaConfig(**TINY)), small_config())
    assert loaded.fused is not None
    assert loaded.fused._screen is None


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "granite"])
def test_rows_that_fill_a_wide_step_up_change_nothing(name: str) -> None:
    """Wide steps come in few sizes, so that few products are compiled and kept."""
    sizes = {padded_rows(rows) for rows in range(1, 513)}
    assert len(sizes) < 50
    assert all(0 <= padded_rows(rows) - rows <= rows // 4 for rows in range(1, 513))
    model = build(CONFIGS[name]())
    model.set_attn_implementation("eager")
    asked = [(prompts(1, seed=i)[0] * 40)[:length] for i, length in enumerate((33, 57, 90, 121))]
    expected = [generate(model, prompt, 6) for prompt in asked]
    config = small_config(max_num_batched_tokens=150, num_gpu_blocks_override=100)
    subject = Engine(load_model(model, config), config)
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, 6, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(4)] == expected


@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed products on this CPU")
def test_after_warming_up_no_step_compiles_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a replica would take more memory with each number of rows that it has not met yet."""
    met: set[tuple[Any, ...]] = set()

    def watch(product: Any) -> Any:
        def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            met.add((product, x.shape, x.dtype, *(t.shape for t in rest if hasattr(t, "shape"))))
            return product(x, *rest)

        return call

    for name in ("_multiply", "_multiply_add"):
        monkeypatch.setattr(kernels, name, watch(getattr(kernels, name)))
    config = small_config(max_num_batched_tokens=70, num_gpu_blocks_override=300)
    subject = Engine(load_model(build(hf.LlamaConfig(**TINY)), config), config)
    subject.warm_up(limit_s=60.0)
    warm = set(met)
    assert warm
    for i, prompt in enumerate(prompts(40, seed=3, longest=90)):
        subject.add(request(f"r{i}", prompt, 1 + i % 12, arrival_s=i, ignore_eos=True))
    drain(subject)
    assert len({shape for _, shape, *_ in met}) > 20
    assert met == warm


def test_what_is_not_exactly_that_block_is_left_alone() -> None:
    class Louder(hf.LlamaForCausalLM):
        pass

    gelu = hf.LlamaConfig(**TINY, hidden_act="gelu")
    adapted = build(hf.LlamaConfig(**TINY))
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
    partly = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    others = [
        build(gelu),
        build(hf.Gemma2Config(**WIDE)),
        Louder(hf.LlamaConfig(**TINY)),
        adapted,
        build(hf.Phi3Config(**WIDE, rope_parameters=partly)),
    ]
    for model in others:
        loaded = load_model(model, small_config())
        assert loaded.fused is None


def test_the_weights_are_held_once() -> None:
    model = build(hf.LlamaConfig(**TINY))
    count = model.num_parameters()
    loaded = load_model(model, small_config())
    assert loaded.num_parameters == count
    left = sum(p.numel() for p in model.parameters())
    embedding_and_norms = TINY["vocab_size"] * TINY["hidden_size"] + 5 * TINY["hidden_size"]
    assert left == embedding_and_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 40), torch.randn(48) if with_bias else None
    subject = Linear(weight.to(dtype), None if bias is None else bias.to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for rows in (1, 2, 7, 33):
        x, residual = torch.randn(rows, 40), torch.randn(rows, 48)
        expected = torch.nn.functional.linear(x, weight, bias)
        with torch.inference_mode():
            plain = subject(x.to(dtype))
            added = subject.plus(x.to(dtype), residual.to(dtype))
        assert plain.dtype == added.dtype == dtype
        torch.testing.assert_close(plain.float(), expected, atol=tolerance, rtol=0.02)
        torch.testing.assert_close(added.float(), expected + residual, atol=tolerance, rtol=0.02)


def test_only_what_has_kernels_is_packed() -> None:
    assert can_pack(torch.float32) == bool(torch.cpu.get_capabilities().get("avx2"))
    assert not can_pack(torch.float64)


needs_half = pytest.mark.skipif(
    not (can_pack(torch.bfloat16) and torch.cpu.get_capabilities().get("avx512_fp16")),
    reason="this CPU cannot multiply float16",
)


@needs_half
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_a_float16_copy_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, size: float
) -> None:
    """Also where results leave float16's range, as only ``plus`` can give them."""
    monkeypatch.setattr(kernels, "half_is_faster", lambda: True)
    torch.manual_seed(0)
    weight = torch.randn(48, 40).bfloat16()
    bias = torch.randn(48).bfloat16() if with_bias else None
    x = (torch.randn(16, 40) * size).bfloat16()
    bound = Bound(float(x.float().norm(dim=1).max()), float(x.abs().max()))
    subject = Linear(weight, bias, bound=bound, may_shrink=True)
    assert subject.input_dtype(16) == torch.float16
    assert subject.input_dtype(1) == torch.bfloat16
    residual = torch.randn(16, 48)
    expected = residual.double() + torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    with torch.inference_mode():
        result = subject.plus(x.half(), residual.clone())
    assert result.dtype == torch.float32
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-3


@needs_half
@pytest.mark.parametrize("bound", [None, Bound(1e5, 1e5), Bound(1e5, 1.0)])
def test_no_float16_where_it_could_overflow(
    monkeypatch: pytest.MonkeyPatch, bound: Bound | None
) -> None:
    monkeypatch.setattr(kernels, "half_is_faster", lambda: True)
    subject = Linear(torch.ones(8, 8).bfloat16(), bound=bound)
    assert subject.input_dtype(512) == torch.bfloat16


needs_narrow = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="torch has no FBGEMM here"
)


@needs_narrow
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_copy_for_few_rows_gives_the_same(with_bias: bool) -> None:
    """Nearer to the exact result than bfloat16's, as neither inputs nor outputs are rounded."""
    torch.manual_seed(0)
    weight = torch.randn(48, 40).bfloat16()
    bias = torch.randn(48).bfloat16() if with_bias else None
    subject, other = Linear(weight, bias), Linear(weight[:16], None)
    add_narrow([subject, other])
    for rows in (1, 2, 14, 15, 32):
        assert subject.input_dtype(rows) == torch.float32
        x, residual = torch.randn(rows, 40), torch.randn(rows, 48)
        expected = torch.nn.functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        with torch.inference_mode():
            torch.testing.assert_close(subject(x).double(), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other(x), x @ weight[:16].float().T, atol=1e-4, rtol=1e-4)
            added = subject.plus(x, residual.clone(), 0.5)
        torch.testing.assert_close(added.double(), residual + 0.5 * expected, atol=1e-4, rtol=1e-4)
    assert subject.input_dtype(33) != torch.float32


@needs_narrow
def test_weights_beyond_float16_have_no_copy_for_few_rows() -> None:
    subject = Linear(torch.full((8, 8), 1e5).bfloat16())
    add_narrow([subject])
    assert subject.input_dtype(1) == torch.bfloat16


@needs_half
@needs_narrow
@pytest.mark.parametrize(
    ("copies", "few", "many"),
    [
        (0, torch.bfloat16, torch.bfloat16),
        (1, torch.float32, torch.bfloat16),
        (2, torch.float32, torch.float16),
    ],
)
def test_copies_stay_within_their_share_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, copies: int, few: torch.dtype, many: torch.dtype
) -> None:
    """All matrices have a copy or none has; also where the model comes from an image."""
    monkeypatch.setattr(narrow, "is_faster", lambda: True)
    monkeypatch.setattr(fused, "half_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "half_is_faster", lambda: True)
    model = build(hf.LlamaConfig(**TINY)).bfloat16()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    one = 2 * (weights - TINY["vocab_size"] * TINY["hidden_size"])  # but the embedding
    monkeypatch.setattr(fused, "free_bytes", lambda: 2 * (copies * one + one // 2))
    loaded = load_model(model, small_config(weight_copies_share=0.5))
    monkeypatch.setattr(fused, "COPY_AFTER_S", 0.0)
    found = WeightImage.of(loaded, "mell-weights-copies", 1 << 30).load()
    for each in (loaded, found):
        for linear in each.fused.matrices():
            wait_for(lambda linear=linear: linear.input_dtype(8) == few)
            assert linear.input_dtype(64) == many


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_bfloat16_in_wide_steps_and_narrow_ones(scale: float) -> None:
    """Logits near those of float64, whatever copy of the weights a step's width selects and
    however large the norms' weights are."""
    model = build(hf.LlamaConfig(**TINY)).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_attention_layernorm" in name:
                parameter.fill_(scale)
    expected = [generate(model.double(), prompt, 1) for prompt in prompts(3, seed=5, longest=30)]
    config = small_config(max_num_batched_tokens=24, dtype="bfloat16")
    subject = Engine(load_model(model.bfloat16(), config), config)
    for i, prompt in enumerate(prompts(3, seed=5, longest=30)):
        subject.add(request(f"r{i}", prompt, 1, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(3)] == expected
