"""From a source to a model in memory: what is read, what it takes, and what is wrong with it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, load_model
from mell_ray.errors import ConfigError, UnsupportedModelError
from tests.engine.support import TINY, build, drain, generate, request, small_config


def test_a_saved_directory_loads(tmp_path: Path) -> None:
    model = build(hf.Qwen2Config(**TINY))
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    config = small_config(max_model_len=100)
    loaded = load_model(str(tmp_path), config)
    assert loaded.kv_shape.dtype == torch.float32
    assert loaded.max_model_len == 100
    assert loaded.eos_token_ids == (1,)
    subject = Engine(loaded, config)
    subject.add(request("r", [5, 6, 7], 10))
    assert drain(subject).tokens["r"] == generate(model, [5, 6, 7], 10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(tmp_path: Path, dtype: str) -> None:
    build(hf.LlamaConfig(**TINY)).save_pretrained(tmp_path)
    config = small_config(dtype=dtype)
    loaded = load_model(str(tmp_path), config)
    assert loaded.kv_shape.dtype == getattr(torch, dtype)
    subject = Engine(loaded, config)
    subject.add(request("r", [5, 6, 7], 10, ignore_eos=True, temperature=1.0))
    assert len(drain(subject).tokens["r"]) == 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    build(hf.LlamaConfig(**TINY)).save_pretrained(path, max_shard_size="20KB")
    return path


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def only_a_pickle(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    torch.save({}, directory / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "directory with config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown architecture": (
        lambda d: edit(d / "config.json", model_type="nonesuch"),
        "model type `nonesuch`.*does not recognize",
    ),
    "code of its own": (
        lambda d: edit(
            d / "config.json",
            model_type="nonesuch",
            auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        ),
        "custom code",
    ),
    "no weights": (
        lambda d: [file.unlink() for file in d.glob("model*")],
        "no file named model.safetensors",
    ),
    "only a pickle": (only_a_pickle, "no file named model.safetensors"),
    "a config that makes no sense": (
        lambda d: edit(d / "config.json", max_position_embeddings=None),
        "Validation error for field 'max_position_embeddings': TypeError: .* expected int",
    ),
    "a shard is gone": (lambda d: shard(d).unlink(), "model-00001-of"),
    "a truncated shard": (
        lambda d: os.truncate(shard(d), shard(d).stat().st_size - 40),
        "damaged or incomplete",
    ),
    "a shard that is no file at all": (
        lambda d: os.truncate(shard(d), 4),
        "damaged or incomplete",
    ),
    "fewer layers than the config says": (
        lambda d: edit(d / "config.json", num_hidden_layers=3),
        r"files lack model.layers.2.\S+, model.layers.2.\S+, \S+ and 6 more",
    ),
    "another vocabulary than the config says": (
        lambda d: edit(d / "config.json", vocab_size=100),
        "disagree on the shape of lm_head.weight, model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_checkpoint_says_what_is_wrong(
    checkpoint: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint, directory)
    spoil, message = DAMAGES[damage]
    spoil(directory)
    with pytest.raises(ConfigError, match=f"(?s)cannot load the model '{directory}'.*{message}"):
        load_model(str(directory), small_config())


def test_a_quantised_checkpoint_is_refused_before_its_weights_are_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint, directory)
    only_a_pickle(directory)
    edit(directory / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(awq\)"):
        load_model(str(directory), small_config())


def test_weights_that_nothing_asks_for_are_named(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint, directory)
    edit(directory / "config.json", num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, logger="mell_ray"):
        load_model(str(directory), small_config())
    assert "no use for: model.layers.1." in caplog.text


def test_a_source_that_is_none_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the model .*'builtin'"):
        load_model(str(tmp_path), EngineConfig())


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len \(512\) exceeds the model's 256"):
        load_model(build(hf.LlamaConfig(**TINY)), small_config(max_model_len=512))


def test_a_pool_too_small_for_one_block_is_refused() -> None:
    loaded = load_model(build(hf.LlamaConfig(**TINY)), small_config())
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        Engine(loaded, EngineConfig(kv_cache_memory_bytes=1000))


def test_several_end_tokens_come_from_the_generation_config() -> None:
    model = build(hf.LlamaConfig(**TINY))
    model.generation_config.eos_token_id = [1, 9]
    assert load_model(model, small_config()).eos_token_ids == (1, 9)


MEASURE = """
import json, sys, threading
import torch
from mell_ray.config import EngineConfig
from mell_ray.engine.loading import load_weights

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

measured = {}
for dtype in ("bfloat16", "float32"):
    before, seen, done = anonymous(), [], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_weights(sys.argv[1], EngineConfig(dtype=dtype), torch.device("cpu"))
    done.set()
    thread.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    measured[dtype] = [weights, max([*seen, anonymous()]) - before]
    del model
print(json.dumps(measured))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_no_second_copy(tmp_path: Path) -> None:
    """A checkpoint of about 200 MB in bfloat16. Memory that is not the file's own pages: next to
    none where the dtype stays, once the weights where every tensor changes it."""
    config = hf.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    measured = json.loads(output.splitlines()[-1])
    for dtype, size, limit in (("bfloat16", 180e6, 0.3), ("float32", 360e6, 1.3)):
        weights, peak = measured[dtype]
        assert weights > size
        assert peak < limit * weights
