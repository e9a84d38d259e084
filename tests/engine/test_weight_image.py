"""Weights in shared memory, and an engine that sleeps and wakes with them."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from mell_ray.engine import Engine, LoadedModel, fused, load_model
from mell_ray.engine.weight_image import ImageError, WeightImage
from mell_ray.engine.weight_store import image_key, load_shared
from mell_ray.errors import ConflictError
from tests.engine.families import FAMILIES
from tests.engine.support import (
    Client,
    build,
    drain,
    prompts,
    request,
    small_config,
    step,
    tiny,
    wait_for,
)

ROOM = 1 << 30


def answers(model: LoadedModel, image: WeightImage | None = None) -> dict[str, list[int]]:
    return ask(Engine(model, small_config(), image=image))


def ask(engine: Engine) -> dict[str, list[int]]:
    for i, prompt in enumerate(prompts(4)):
        engine.add(request(f"r{i}", prompt))
    return drain(engine).tokens


def image_of(model: LoadedModel) -> WeightImage:
    return WeightImage.of(model, "mell-weights-test", ROOM)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_answers_the_same_from_its_image(family: str) -> None:
    model = load_model(build(FAMILIES[family]()), small_config())
    assert answers(image_of(model).load()) == answers(model)


def test_packed_bfloat16_answers_the_same_from_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(build(FAMILIES["llama-tied"]()).bfloat16(), small_config())
    monkeypatch.setattr(fused, "COPY_AFTER_S", 0.0)
    found = image_of(model).load()
    assert model.fused is not None
    assert found.fused is not None
    for one, other in zip(model.fused.matrices(), found.fused.matrices(), strict=True):
        wait_for(lambda a=one, b=other: a.input_dtype(1) == b.input_dtype(1))
    assert answers(found) == answers(model)


def own_pages_kb(name: str) -> tuple[int, int]:
    """(mapped, written) kB of this process's mappings of a file in memory."""
    mapped = written = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = f"memfd:{name} " in line
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1])
        elif inside and line.startswith("Anonymous:"):
            written += int(line.split()[1])
    return mapped, written


def test_an_engine_runs_from_the_shared_pages_and_writes_none() -> None:
    image = WeightImage.of(tiny(), "mell-weights-pages", ROOM)
    model = image.load()
    answers(model)
    mapped, written = own_pages_kb("mell-weights-pages")
    assert mapped * 1024 >= image.nbytes
    assert written == 0


def test_pages_go_when_the_engine_sleeps_and_come_back() -> None:
    image = WeightImage.of(tiny(), "mell-weights-sleep", ROOM)
    engine = Engine(image.load(), small_config(), image=image)
    before = ask(engine)
    engine.sleep()
    assert own_pages_kb("mell-weights-sleep") == (0, 0)
    with pytest.raises(ConflictError, match="sleeps"):
        engine.add(request("early", [5, 6, 7]))
    engine.wake()
    engine.check()
    assert engine.stats().cached_blocks == 0
    assert ask(engine) == before


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_nothing_of_the_old_kv_is_found_after_a_sleep(kv_cache_dtype: str) -> None:
    image = image_of(tiny())
    engine = Engine(image.load(), small_config(kv_cache_dtype=kv_cache_dtype), image=image)
    before = ask(engine)
    assert engine.stats().cached_blocks > 0
    hits = engine.stats().prefix_hit_tokens
    engine.sleep()
    engine.wake()
    assert ask(engine) == before
    assert engine.stats().prefix_hit_tokens == hits


def test_an_engine_with_requests_stays_awake() -> None:
    image = image_of(tiny())
    engine = Engine(image.load(), small_config(), image=image)
    engine.add(request("a", [5, 6, 7]))
    with pytest.raises(ConflictError, match="requests"):
        engine.sleep()
    client = Client()
    step([engine], client)
    with pytest.raises(ConflictError, match="requests"):
        engine.sleep()
    assert drain(engine, client).finished


def test_an_engine_without_an_image_cannot_sleep() -> None:
    engine = Engine(tiny(), small_config())
    with pytest.raises(ConflictError, match="not shared"):
        engine.sleep()


def test_what_does_not_fit_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ImageError, match="are free"):
        WeightImage.of(tiny(), "mell-weights-test", 1000)
    monkeypatch.setattr("mell_ray.engine.weight_store.free_bytes", lambda: 1000)
    model, image = load_shared("big", tiny, tmp_path)
    assert image is None
    assert model is tiny()
    assert "not shared" in caplog.text


def never() -> LoadedModel:
    raise AssertionError("the weights were loaded though they are here")


HOLDER = """
import sys
from pathlib import Path
from mell_ray.engine.weight_store import load_shared
from tests.engine.support import tiny
model, image = load_shared("key", tiny, Path(sys.argv[1]))
print(image is not None, flush=True)
sys.stdin.read()
"""


def test_weights_come_from_another_process_as_long_as_one_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    expected = answers(tiny())
    model, image = load_shared("key", never, tmp_path)
    assert image is not None
    assert answers(model) == expected
    holder.kill()
    holder.communicate()
    again, second = load_shared("key", never, tmp_path)  # this process holds it now
    assert second is not None
    assert answers(again) == expected
    image.close()
    second.close()
    del model, again
    gc.collect()
    loads: list[None] = []

    def load() -> LoadedModel:
        loads.append(None)
        return tiny()

    _, third = load_shared("key", load, tmp_path)
    assert loads == [None]
    assert third is not None
    third.close()
    _, other = load_shared("another", tiny, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another"]
    assert other is not None
    other.close()


@pytest.mark.parametrize("text", ["", "1 0\n", "garbage\n", "999999999 3\nx y\n"])
def test_a_list_that_names_nobody_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    model, image = load_shared("key", tiny, tmp_path)
    assert image is not None
    assert answers(model) == answers(tiny())
    image.close()


def test_keys_tell_weights_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    source = str(tmp_path)
    first = image_key(source, small_config(), "cpu")
    assert image_key(source, small_config(max_num_seqs=4), "cpu") == first
    assert image_key(source, small_config(dtype="bfloat16"), "cpu") != first
    assert image_key(source, small_config(), "cuda") != first
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert image_key(source, small_config(), "cpu") != first
