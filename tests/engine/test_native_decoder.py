"""Models run by compiled layers: the same as transformers' in float64, whatever else happens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mell_kernels import native, screen
from mell_kernels.native_screen import NativeScreen

from mell_ray.engine import Engine, LoadedModel, fused, gate, load_model
from mell_ray.engine.model import PagedKV
from mell_ray.engine.native_decoder import NativeDecoder
from mell_ray.engine.weight_image import WeightImage
from tests.engine.support import Client, build, drain, prompts, request, small_config, step
from tests.engine.test_fused import CONFIGS
from tests.engine.test_migration import move_kv, move_tokens
from tests.kernels.native_cases import forget_cpu, threads

pytestmark = pytest.mark.skipif(
    not native.is_possible(32, [128]), reason="nothing is compiled for this CPU"
)

# Of the standard deviation of logits: RMS over a text, and for the one logit that errs most, of
# which two that are closer to each other may change places. Keys and values are rounded to
# bfloat16, or to codes of int8, which is most of it.
NEAR = {"auto": 0.01, "int8": 0.03}
SURE = {"auto": 0.05, "int8": 0.12}
LENGTH = 20


@dataclass(slots=True)
class Subject:
    exact: Any  # transformers' own, float64
    loaded: LoadedModel

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.exact(torch.tensor([tokens]), use_cache=False).logits[0]

    def check(self, prompt: list[int], tokens: list[int], room: float) -> torch.Tensor:
        """Each token is the likeliest after those before it, but for ``room``; returns for each
        whether no other comes as close."""
        logits = self.logits(prompt + tokens)[len(prompt) - 1 : -1]
        room *= float(logits.std())
        best = logits.topk(2).values
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (best[:, 0] - chosen <= room).all()
        return best[:, 0] - best[:, 1] > room


@cache
def made(name: str, **changes: Any) -> Any:
    config = CONFIGS[name]()
    # Heads of 32 dimensions, as compiled code wants them at least, and scores of about 1.
    sizes = {"hidden_size": 128, "intermediate_size": 90, "initializer_range": 0.09}
    if getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = 32
    config.update({**sizes, **changes})
    model = build(config)
    for parameter in model.parameters():  # norms of one and biases of zero would prove nothing
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name == "gemma" else 1.0, std=0.3)
    return model.bfloat16()


def exact_of(model: Any) -> Any:
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    return exact


@cache
def subject(name: str) -> Subject:
    model = made(name)
    exact = exact_of(model)
    return Subject(exact, load_model(copy.deepcopy(model), small_config()))


ASKED = prompts(5, seed=3, longest=50)
FIRM, ROOM = "granite", 0.03  # it errs little


def answers(engine: Engine, length: int = LENGTH) -> list[list[int]]:
    for i, prompt in enumerate(ASKED):
        engine.add(request(f"r{i}", prompt, length, arrival_s=i, ignore_eos=True))
    tokens = drain(engine).tokens
    return [tokens[f"r{i}"] for i in range(len(ASKED))]


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_those_of_float64(name: str, kv: str) -> None:
    model = subject(name)
    assert isinstance(model.loaded.fused, NativeDecoder | fused.MixedDecoder)
    paged = replace(model.loaded, kv_shape=model.loaded.kv_shape.stored_as(kv))
    text = prompts(1, seed=8)[0] * 30
    for tokens in (text[:30], text[:70]):
        exact = model.logits(tokens)
        with torch.inference_mode():
            logits = gate._paged_logits(paged, tokens, 4)
        error = (logits - exact).square().mean().sqrt() / exact.std()
        assert error <= NEAR[kv]


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_tokens_are_those_of_float64(name: str, kv: str) -> None:
    model = subject(name)
    config = small_config(max_num_batched_tokens=11, max_num_seqs=4, kv_cache_dtype=kv)
    sure = 0
    for prompt, tokens in zip(ASKED, answers(Engine(model.loaded, config)), strict=True):
        assert len(tokens) == LENGTH
        sure += int(model.check(prompt, tokens, SURE[kv]).sum())
    assert sure >= 2 * LENGTH


def agree(model: Subject, some: list[list[int]], others: list[list[int]], room: float) -> None:
    """Both are right, and equal until there is a doubt."""
    sure = 0
    for prompt, one, other in zip(ASKED, some, others, strict=True):
        assert len(one) == len(other) == LENGTH
        is_sure = model.check(prompt, one, room)
        sure += int(model.check(prompt, other, room).sum())
        known = int((~is_sure).nonzero()[0]) if (~is_sure).any() else LENGTH
        assert other[:known] == one[:known]
    assert sure >= 3 * LENGTH


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_vnni"), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "granite", "qwen3"])
def test_the_likeliest_token_without_most_logits(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Alone and beside a request that wants other logits; also from an image."""
    monkeypatch.setattr(screen, "_SMALLEST", 1)
    model = made(name, vocab_size=4000)
    exact = exact_of(model)
    loaded = load_model(copy.deepcopy(model), small_config())
    told: list[int] = []

    def noted(self: NativeScreen, x: torch.Tensor, *args: Any) -> torch.Tensor | None:
        ids = likeliest(self, x, *args)
        told.append(0 if ids is None else len(ids))
        return ids

    likeliest = NativeScreen.likeliest
    monkeypatch.setattr(NativeScreen, "likeliest", noted)
    for each in (loaded, WeightImage.of(loaded, "mell-weights-screened", 1 << 30).load()):
        for others in (0, 1):
            engine = Engine(each, small_config())
            for i in range(others):
                engine.add(request(f"other{i}", ASKED[0], LENGTH // 2, temperature=1.0))
            told.clear()
            for prompt, tokens in zip(ASKED, answers(engine), strict=True):
                Subject(exact, each).check(prompt, tokens, SURE["auto"])
            assert sum(told) > LENGTH


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "granite"])
def test_the_same_tokens_from_a_weight_image(name: str) -> None:
    loaded = subject(name).loaded
    found = WeightImage.of(loaded, "mell-weights-native", 1 << 30).load()
    assert type(found.fused) is type(loaded.fused)
    tokens = prompts(1, seed=8)[0][:30]
    with torch.inference_mode():
        some, others = (gate._paged_logits(each, tokens, 4) for each in (loaded, found))
    assert torch.equal(some, others)
    config = small_config()
    assert answers(Engine(found, config)) == answers(Engine(loaded, config))


def test_the_image_outlives_a_sleep() -> None:
    image = WeightImage.of(subject("qwen3").loaded, "mell-weights-native-sleep", 1 << 30)
    engine = Engine(image.load(), small_config(), image=image)
    before = answers(engine)
    engine.sleep()
    engine.wake()
    assert answers(engine) == before


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("mode", ["kv", "token"])
def test_a_request_that_moves_goes_on_with_its_tokens(mode: str, kv: str) -> None:
    """To and fro, at each of its steps, beside others that stay."""
    model = subject(FIRM)
    config = small_config(max_num_batched_tokens=16, kv_cache_dtype=kv)
    room = ROOM * (1 if kv == "auto" else 2)
    undisturbed = answers(Engine(model.loaded, config))
    engines = [Engine(model.loaded, config) for _ in range(2)]
    client, moved = Client(), 0
    for i, prompt in enumerate(ASKED):
        state = request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True)
        engines[i % 2].add(state)
    while any(each.has_work() for each in engines):
        step(engines, client)
        for name in ("r0", "r3"):
            here = [each for each in engines if each.generation_of(name) is not None]
            if here:
                src, dst = here[0], engines[here[0] is engines[0]]
                move = move_kv if mode == "kv" else move_tokens
                move(src, dst, name, client, stages=moved % 3)
                moved += 1
    assert moved > 10
    agree(model, [client.tokens[f"r{i}"] for i in range(len(ASKED))], undisturbed, room)


def test_where_nothing_is_compiled_torch_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = subject(FIRM)
    expected = answers(Engine(model.loaded, small_config()))
    with monkeypatch.context() as patch:
        patch.setattr(native, "__file__", str(tmp_path / "native.py"))
        forget_cpu()
        loaded = load_model(copy.deepcopy(made(FIRM)), small_config())
    forget_cpu()
    assert type(loaded.fused) is fused.FusedDecoder
    agree(model, expected, answers(Engine(loaded, small_config())), 2 * ROOM)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3"])
def test_the_model_gives_its_matrices_away(name: str) -> None:
    """Else they would be held twice. Embeddings and norms are left."""
    model = copy.deepcopy(made(name))
    count = model.num_parameters()
    kept = sum(p.numel() for n, p in model.named_parameters() if "embed" in n or "norm" in n)
    loaded = load_model(model, small_config())
    assert loaded.num_parameters == count
    assert sum(p.numel() for p in model.parameters()) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    loaded = load_model(copy.deepcopy(made("llama")).to(dtype), small_config())
    assert type(loaded.fused) is fused.FusedDecoder


def test_steps_of_few_tokens_beside_steps_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a matrix unit serves the latter."""
    model = subject(FIRM)
    own = torch.cpu.get_capabilities()
    with monkeypatch.context() as patch:
        patch.setattr(fused.torch.cpu, "get_capabilities", lambda: {**own, "amx_bf16": True})
        loaded = load_model(copy.deepcopy(made(FIRM)), small_config())
    assert isinstance(loaded.fused, fused.MixedDecoder)
    monkeypatch.setattr(fused.MixedDecoder, "FEW", 32)
    told = {"few": 0, "many": 0}

    def counted(name: str) -> Any:
        decoder = getattr(loaded.fused, name)

        def call(input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
            told[name] += 1
            return decoder(input_ids, *args)

        return call

    for name in told:
        monkeypatch.setattr(loaded.fused, name, counted(name))
    config = small_config(max_num_batched_tokens=48, dense_kv_share=0.5)
    expected = answers(Engine(model.loaded, config))
    agree(model, expected, answers(Engine(loaded, config)), 2 * ROOM)
    assert all(told.values())


def test_two_engines_by_turns_with_other_numbers_of_threads() -> None:
    """Of one model, and of two."""
    loaded = [subject(name).loaded for name in (FIRM, FIRM, "qwen3")]
    alone = [answers(Engine(each, small_config())) for each in loaded]
    engines = [Engine(each, small_config()) for each in loaded]
    for engine in engines:
        for i, prompt in enumerate(ASKED):
            engine.add(request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True))
    clients = [Client() for _ in engines]
    while any(engine.has_work() for engine in engines):
        for count, engine, client in zip((1, 2, 3), engines, clients, strict=True):
            with threads(count):
                step([engine], client)
    for client, tokens in zip(clients, alone, strict=True):
        assert [client.tokens[f"r{i}"] for i in range(len(ASKED))] == tokens


@pytest.mark.parametrize(
    ("kv", "owner", "name"),
    [
        ("auto", native.Layers, "run"),
        ("int8", native.Layers, "run_around"),
        ("int8", PagedKV, "attend"),
    ],
)
def test_a_step_that_fails_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, kv: str, owner: Any, name: str
) -> None:
    """Whether it failed before or after keys and values were written; among layers, in the second
    one."""
    loaded, config = subject(FIRM).loaded, small_config(kv_cache_dtype=kv)
    expected = answers(Engine(loaded, config))
    engine, client = Engine(loaded, config), Client()
    for i, prompt in enumerate(ASKED):
        engine.add(request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True))
    original = getattr(owner, name)
    for turn in range(6):

        def failing(
            self: Any, first: Any, *args: Any, late: bool = turn % 2 > 0, **how: Any
        ) -> Any:
            if late or (name == "attend" and first == 0):
                result = original(self, first, *args, **how)
                if name == "attend" and first == 0:
                    return result
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        step([engine], client)
    drain(engine, client)
    assert [client.tokens[f"r{i}"] for i in range(len(ASKED))] == expected
