from __future__ import annotations

import pytest

from mell_ray.errors import ConfigError
from mell_ray.simulation.hardware import GIB, GPUS, find_gpu, override_gpu
from mell_ray.simulation.modelspec import ModelSpec
from mell_ray.simulation.sizing import SizingOverrides, size_replica, sizing_advice

LLAMA_3_8B = ModelSpec("llama-3-8b", 32, 8, 65536, 131072, 8.03e9, 7.5e9, 16.06e9, 8192)
LLAMA_3_70B = ModelSpec("llama-3-70b", 80, 8, 163840, 327680, 70.55e9, 69.5e9, 141.1e9, 8192)
LATENT = ModelSpec("latent", 61, 0, 35136, 70272, 671e9, 36.6e9, 671e9, None)


def test_a_model_that_fits_one_gpu() -> None:
    got = size_replica(find_gpu("h100-80g"), LLAMA_3_8B, needed_tokens=8000)
    assert got.gpus == 1
    assert got.capacity_tokens == int((79.6 * GIB * 0.9 - 16.06e9) / 131072)
    assert got.decode_tokens_per_s == pytest.approx(0.7 * 3350e9 / (79.6 * GIB * 0.9), rel=1e-3)
    assert got.prefill_tokens_per_s == pytest.approx(0.5 * 989e12 / (2 * 7.5e9))
    assert got.migration_price == pytest.approx(131072 / 12.5e9)
    assert got.price_per_hour == find_gpu("h100-80g").price_per_hour


def test_weights_that_do_not_fit_one_gpu_take_a_group() -> None:
    got = size_replica(find_gpu("h100-80g"), LLAMA_3_70B, needed_tokens=8000)
    assert got.gpus == 2
    assert got.capacity_tokens == int((2 * 79.6 * GIB * 0.9 - 141.1e9) / 327680)
    assert got.price_per_hour == 2 * find_gpu("h100-80g").price_per_hour


def test_a_replica_with_little_room_for_kv_is_remarked_on() -> None:
    gpu = find_gpu("h100-80g")
    tight = size_replica(gpu, LLAMA_3_70B, needed_tokens=8000)  # 12.7 GB of 154 GB for KV
    advice = sizing_advice(gpu, LLAMA_3_70B, tight)
    assert advice is not None
    assert "--gpus-per-replica 4 would hold 6.5 x" in advice
    roomy = size_replica(gpu, LLAMA_3_8B, needed_tokens=8000)
    assert sizing_advice(gpu, LLAMA_3_8B, roomy) is None


def test_a_long_request_needs_a_larger_group() -> None:
    gpu = find_gpu("h100-80g")
    fits_one = size_replica(gpu, LLAMA_3_8B, needed_tokens=1).capacity_tokens
    assert size_replica(gpu, LLAMA_3_8B, needed_tokens=fits_one).gpus == 1
    assert size_replica(gpu, LLAMA_3_8B, needed_tokens=fits_one + 1).gpus == 2


def test_kv_is_copied_where_heads_cannot_be_split_further() -> None:
    def kv_bytes(model: ModelSpec, gpus: int) -> float:
        chosen = SizingOverrides(gpus_per_replica=gpus)
        sized = size_replica(GPUS["b200-180g"], model, needed_tokens=1, overrides=chosen)
        return sized.kv_bytes_per_token

    assert kv_bytes(LLAMA_3_70B, 8) == 327680
    assert kv_bytes(LLAMA_3_70B, 16) == 2 * 327680
    assert kv_bytes(LATENT, 8) == 8 * 70272


def test_figures_of_the_user_win() -> None:
    known = SizingOverrides(
        gpus_per_replica=2,
        capacity_tokens=1000,
        decode_tokens_per_s=50.0,
        prefill_tokens_per_s=1e6,
        link_gb_per_s=131.072,
    )
    got = size_replica(GPUS["a100-80g"], LLAMA_3_8B, needed_tokens=9, overrides=known)
    assert (got.gpus, got.capacity_tokens, got.decode_tokens_per_s) == (2, 1000, 50.0)
    assert got.migration_price == pytest.approx(5e-7)
    assert got.link_tokens_per_s == pytest.approx(2e6)


def test_recomputing_sets_the_price_where_the_link_is_slow() -> None:
    slow = SizingOverrides(link_gb_per_s=1.0)
    got = size_replica(GPUS["h100-80g"], LLAMA_3_8B, needed_tokens=9, overrides=slow)
    assert got.migration_price == pytest.approx(1 / got.prefill_tokens_per_s)


def test_what_cannot_fit_is_refused_with_the_figures() -> None:
    one = SizingOverrides(gpus_per_replica=1)
    with pytest.raises(ConfigError, match=r"131\.4 GiB of the 71\.6 GiB usable"):
        size_replica(GPUS["h100-80g"], LLAMA_3_70B, needed_tokens=1, overrides=one)
    with pytest.raises(ConfigError, match="does not fit 32 x t4-16g"):
        size_replica(GPUS["t4-16g"], LATENT, needed_tokens=1)
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        size_replica(GPUS["t4-16g"], LATENT, needed_tokens=1, memory_utilization=1.5)


def test_gpu_names() -> None:
    assert find_gpu("H100_80G").name == "h100-80g"
    assert find_gpu("h200").name == "h200-141g"
    with pytest.raises(ConfigError, match="could be a100-40g, a100-80g"):
        find_gpu("a100")
    with pytest.raises(ConfigError, match=r"not in the built-in table\. Known: t4-16g"):
        find_gpu("abacus")
    with pytest.raises(ConfigError, match="not in the built-in table"):
        find_gpu("")


def test_gpu_figures_can_be_overridden() -> None:
    gpu = override_gpu(GPUS["l4-24g"], memory_gib=48.0, price_per_hour=0.0, bf16_tflops=None)
    assert (gpu.memory_gib, gpu.price_per_hour, gpu.bf16_tflops) == (48.0, 0.0, 121)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="memory_gib must be a positive number"):
            override_gpu(gpu, memory_gib=wrong)
