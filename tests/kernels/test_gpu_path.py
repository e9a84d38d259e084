"""What a GPU needs of the engine besides kernels, with stand-ins for what only a GPU has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

from mell_ray.engine import Engine, load_model
from mell_ray.engine.graphs import DecodeGraphs, Forward, bucket_sizes
from mell_ray.engine.kv_pool import KVPool
from mell_ray.engine.memory import MemoryProfile, _largest_step, graph_sizes, profile
from mell_ray.engine.weight_image import WeightImage
from tests.engine.support import TINY, build, drain, generate, prompts, request, small_config, tiny


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 300])
def test_every_batch_has_a_graph_not_much_larger(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= max(7, count // 3)


class Replays:
    """Captures a function by keeping it, and counts how often each is replayed."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, forward: Forward) -> Forward:
        size = len(forward())
        self.captured.append(size)

        def replay() -> torch.Tensor:
            self.replayed.append(size)
            return forward()

        return replay


def with_graphs(subject: Engine, sizes: list[int]) -> Replays:
    """The same static inputs, padding and batch sizes as on a GPU."""
    replays = Replays()
    width = subject.max_model_len // subject.block_size + 1
    with torch.inference_mode():
        subject._graphs = DecodeGraphs(subject._model, subject._kv, sizes, width, replays)
    return replays


@pytest.mark.parametrize("model_type", ["llama", "mistral-window"])
def test_padded_decodes_change_no_token(model_type: str) -> None:
    """Requests of many lengths come and go, so most batches are padded and rows change owners."""
    make: Callable[[], object] = {
        "llama": lambda: hf.LlamaConfig(**TINY),
        "mistral-window": lambda: hf.MistralConfig(**TINY, sliding_window=7),
    }[model_type]
    settings = small_config(num_gpu_blocks_override=200)
    subject = Engine(load_model(build(make()), settings), settings)
    replays = with_graphs(subject, [1, 2, 4, 7])
    asked = prompts(9, seed=11, longest=30)
    for i, prompt in enumerate(asked):
        subject.add(request(f"r{i}", prompt, max_tokens=3 + 2 * i))
    told = drain(subject).tokens
    plain = build(make())
    assert [told[f"r{i}"] for i in range(9)] == [
        generate(plain, prompt, 3 + 2 * i) for i, prompt in enumerate(asked)
    ]
    assert replays.captured == [7, 4, 2, 1]
    assert len(set(replays.replayed)) >= 3


def test_padding_writes_only_into_the_padding_block() -> None:
    settings = small_config()
    subject = Engine(tiny(), settings)
    with_graphs(subject, [8])
    subject.add(request("r", [5, 6, 7], max_tokens=6, ignore_eos=True))
    subject.step()
    held = subject._seqs["r"].blocks
    before = subject._kv.tensor.clone()
    subject.step()
    changed = (subject._kv.tensor != before).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    assert changed
    assert set(changed) <= {0, *held}


def test_a_step_with_prefill_is_not_replayed() -> None:
    subject = Engine(tiny(), small_config())
    replays = with_graphs(subject, [1, 2])
    subject.add(request("r", [5, 6, 7], max_tokens=3, ignore_eos=True))
    subject.step()
    assert replays.replayed == []
    subject.step()
    assert replays.replayed == [1]


class Device:
    """A GPU of 1000 bytes; 70 are other people's, and 30 CUDA's own."""

    def __init__(self) -> None:
        self.held = 400
        self.cached = 0
        self.most = 0
        self.graphs = 0

    def total(self) -> int:
        return 1000

    def used(self) -> int:
        return 100 + self.reserved() + self.graphs

    def reserved(self) -> int:
        return self.held + self.cached

    def peak(self) -> int:
        return self.most

    def trim(self) -> None:
        self.cached = 0
        self.most = self.reserved()

    def step(self) -> None:
        self.cached = 120
        self.most = max(self.most, self.reserved() + 30)
        self.cached = 90

    def capture(self, size: int) -> None:
        self.graphs += 40 if self.graphs == 0 else 5
        self.cached += size


def test_the_pool_gets_what_nothing_else_needs() -> None:
    device = Device()
    found = profile(device, device.step, device.capture, [1, 2, 4, 8])
    assert found == MemoryProfile(
        total=1000, others=100, weights=400, activations=150, graphs=40 + 3 * 5
    )
    assert found.kv_bytes(0.9) == 900 - 100 - 400 - 150 - 55
    assert found.kv_bytes(0.5) < 0
    eager = profile(Device(), lambda: None, device.capture, [])
    assert (eager.graphs, eager.activations) == (0, 0)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_the_largest_step_runs_in_the_padding_block(kind: str) -> None:
    config = small_config(max_num_seqs=5, max_num_batched_tokens=33, kv_cache_dtype=kind)
    kv = KVPool(tiny().kv_shape.stored_as(kind), config.block_size, 2, torch.device("cpu"))
    _largest_step(tiny(), kv, config)
    written = (kv.tensor != 0).flatten(1).any(dim=1).tolist()
    assert written == [True, False, False]


def test_graphs_are_off_where_they_cannot_be() -> None:
    shape = tiny().kv_shape
    assert graph_sizes(shape, small_config(max_num_seqs=4)) == [1, 2, 4]
    assert graph_sizes(shape, small_config(enforce_eager=True)) == []
    assert graph_sizes(shape.stored_as("int8"), small_config()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_filled_but_not_beyond_its_share() -> None:
    config = small_config(num_gpu_blocks_override=None, gpu_memory_utilization=0.3)
    model = load_model(build(hf.LlamaConfig(**TINY)), config, "cuda")
    subject = Engine(model, config, "cuda")
    pool: KVPool = subject._kv
    free, total = torch.cuda.mem_get_info()
    assert pool.tensor.nbytes > 0.1 * total
    assert total - free <= 0.31 * total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_engine_leaves_the_gpu_and_comes_back() -> None:
    config = small_config(num_gpu_blocks_override=200)
    model = load_model(build(hf.LlamaConfig(**TINY)), config, "cuda")
    image = WeightImage.of(model, "mell-weights-gpu", 1 << 30)
    subject = Engine(model, config, "cuda", image=image)
    del model
    prompt = prompts(1)[0]
    subject.add(request("before", prompt))
    before = drain(subject).tokens["before"]
    held = torch.cuda.memory_allocated()
    subject.sleep()
    assert torch.cuda.memory_allocated() < held
    subject.wake()
    subject.add(request("after", prompt))
    assert drain(subject).tokens["after"] == before
