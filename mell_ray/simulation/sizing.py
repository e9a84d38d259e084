"""From a GPU and a model to a replica: how many GPUs it takes, what fits in, how fast it goes.

Speeds are roofline estimates. A decode step reads the weights and the whole KV pool once, as it
does when the pool is full, which is what packing aims at; prefill does two operations per active
parameter and token. Both are taken at the shares of the peak that good kernels reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mell_ray.errors import ConfigError
from mell_ray.simulation.hardware import GB, GIB, NETWORK_GB_PER_S, Gpu
from mell_ray.simulation.modelspec import ModelSpec

BANDWIDTH_SHARE = 0.7  # of the data sheet's memory bandwidth; an assumption
COMPUTE_SHARE = 0.5  # of the data sheet's dense bf16 rate; an assumption
_GROUP_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """One replica: the bin that requests are packed into. Rates are of the whole replica."""

    gpus: int
    capacity_tokens: int
    kv_bytes_per_token: float  # over all GPUs of the replica, copies of shared heads included
    decode_tokens_per_s: float  # of one request, with the KV pool full
    prefill_tokens_per_s: float
    link_tokens_per_s: float  # KV that can be sent to another replica
    price_per_hour: float

    @property
    def migration_price(self) -> float:
        """Replica-seconds that moving one token costs: the cheaper of sending and recomputing."""
        return min(1 / self.link_tokens_per_s, 1 / self.prefill_tokens_per_s)


@dataclass(frozen=True, slots=True)
class SizingOverrides:
    """What the user knows better; None: estimate."""

    gpus_per_replica: int | None = None
    capacity_tokens: int | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    link_gb_per_s: float | None = None  # per GPU, one direction


def size_replica(
    gpu: Gpu,
    model: ModelSpec,
    *,
    needed_tokens: int,
    memory_utilization: float = 0.9,
    overrides: SizingOverrides | None = None,
) -> ReplicaSize:
    """The smallest replica that holds the weights and one request of ``needed_tokens``.

    Args:
        needed_tokens: a request size that must fit, say the trace's p99.9.
        memory_utilization: share of the GPUs' memory for weights and KV, as the engine's setting
            ``gpu_memory_utilization``.

    Raises:
        ConfigError: no group of up to 32 GPUs is enough, or the one asked for is not.
    """
    given = overrides or SizingOverrides()
    if not 0 < memory_utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], got {memory_utilization}")
    gpus = given.gpus_per_replica or _smallest_group(gpu, model, needed_tokens, memory_utilization)
    fits = _capacity(gpu, model, gpus, memory_utilization)
    capacity = given.capacity_tokens or fits
    if capacity < 1:
        weights, room = model.weight_bytes / GIB, gpus * gpu.memory_gib * memory_utilization
        raise ConfigError(
            f"{model.name} does not fit {gpus} x {gpu.name}: its weights take {weights:.1f} GiB of "
            f"the {room:.1f} GiB usable; raise --gpus-per-replica"
        )
    kv_bytes = model.kv_bytes_per_token * _kv_copies(model, gpus)
    bandwidth = gpus * gpu.memory_gb_per_s * GB * BANDWIDTH_SHARE
    compute = gpus * gpu.bf16_tflops * 1e12 * COMPUTE_SHARE
    link = gpus * (given.link_gb_per_s or min(NETWORK_GB_PER_S, gpu.peer_gb_per_s)) * GB
    step_s = (model.weight_bytes + capacity * kv_bytes) / bandwidth
    return ReplicaSize(
        gpus=gpus,
        capacity_tokens=capacity,
        kv_bytes_per_token=kv_bytes,
        decode_tokens_per_s=given.decode_tokens_per_s or 1 / step_s,
        prefill_tokens_per_s=given.prefill_tokens_per_s or compute / (2 * model.active_params),
        link_tokens_per_s=link / kv_bytes,
        price_per_hour=gpus * gpu.price_per_hour,
    )


def sizing_advice(
    gpu: Gpu, model: ModelSpec, size: ReplicaSize, *, memory_utilization: float = 0.9
) -> str | None:
    """A sentence for the report where twice the GPUs would hold much more KV for each GPU."""
    doubled = _capacity(gpu, model, 2 * size.gpus, memory_utilization)
    gain = doubled / (2 * size.capacity_tokens)
    if gain < 1.5:
        return None
    return (
        f"weights take most of {size.gpus} x {gpu.name}: --gpus-per-replica {2 * size.gpus} would "
        f"hold {gain:.1f} x the KV per GPU"
    )


def _smallest_group(gpu: Gpu, model: ModelSpec, needed: int, utilization: float) -> int:
    for gpus in _GROUP_SIZES:
        if _capacity(gpu, model, gpus, utilization) >= needed:
            return gpus
    raise ConfigError(
        f"{model.name} with a request of {needed} tokens does not fit {_GROUP_SIZES[-1]} x "
        f"{gpu.name}: weights {model.weight_bytes / GIB:.1f} GiB, "
        f"KV {model.kv_bytes_per_token / 1024:.0f} KiB a token; name a larger --gpu, or set "
        "--gpus-per-replica and drop long requests"
    )


def _capacity(gpu: Gpu, model: ModelSpec, gpus: int, utilization: float) -> int:
    room = gpus * gpu.memory_gib * GIB * utilization - model.weight_bytes
    return math.floor(room / (model.kv_bytes_per_token * _kv_copies(model, gpus)))


def _kv_copies(model: ModelSpec, gpus: int) -> float:
    """How often each KV value is stored when heads are split over ``gpus`` (tensor parallelism).

    A head is not split, and a latent vector belongs to every head.
    """
    if model.kv_heads == 0:
        return float(gpus)
    return gpus * math.ceil(model.kv_heads / gpus) / model.kv_heads
