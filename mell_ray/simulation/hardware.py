"""GPUs that people rent: what they hold, how fast they read, compute and send.

Memory is what the driver reports (a little under the name on the box), bandwidths and dense bf16
rates are the makers' data sheets. Prices are *assumptions*: rough on-demand figures that differ
several-fold between providers. Every figure can be overridden, and the report says which were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mell_ray.errors import ConfigError

GIB = 1 << 30
GB = 10**9

#: A fleet spans nodes, so what a migration can count on is the network: 100 Gbit/s per GPU,
#: an assumption.
NETWORK_GB_PER_S = 12.5


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator as the planner sees it."""

    name: str
    memory_gib: float
    memory_gb_per_s: float
    bf16_tflops: float  # dense, without sparsity; fp16 where the chip has no bf16
    peer_gb_per_s: float  # to a GPU of the same node, one direction: NVLink, xGMI or PCIe
    price_per_hour: float  # US dollars; an assumption


_GPUS = (
    Gpu("t4-16g", 15.0, 320, 65, 16, 0.50),
    Gpu("v100-16g", 16.0, 900, 125, 150, 1.00),
    Gpu("v100-32g", 32.0, 900, 125, 150, 1.50),
    Gpu("a10g-24g", 22.5, 600, 70, 32, 1.00),
    Gpu("l4-24g", 22.5, 300, 121, 32, 0.80),
    Gpu("rtx4090-24g", 24.0, 1008, 165, 32, 0.50),
    Gpu("rtx5090-32g", 31.8, 1792, 209, 64, 0.80),
    Gpu("l40s-48g", 45.0, 864, 362, 32, 1.60),
    Gpu("a100-40g", 40.0, 1555, 312, 300, 1.40),
    Gpu("a100-80g", 80.0, 2039, 312, 300, 1.80),
    Gpu("h100-80g", 79.6, 3350, 989, 450, 3.00),
    Gpu("h100-pcie-80g", 79.6, 2000, 756, 64, 2.50),
    Gpu("h100-nvl-94g", 93.6, 3938, 835, 300, 3.00),
    Gpu("h200-141g", 140.4, 4800, 989, 450, 3.80),
    Gpu("b200-180g", 179.0, 8000, 2250, 900, 5.50),
    Gpu("mi300x-192g", 192.0, 5300, 1307, 448, 2.50),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``: the whole name, or its first words where only one GPU has them.

    Raises:
        ConfigError: unknown or ambiguous; the message lists what there is.
    """
    key = name.strip().lower().replace("_", "-")
    if key in GPUS:
        return GPUS[key]
    matches = [known for known in GPUS if known.startswith(key + "-")]
    if len(matches) == 1:
        return GPUS[matches[0]]
    problem = f"could be {', '.join(matches)}" if matches else "is not in the built-in table"
    raise ConfigError(
        f"--gpu {name!r} {problem}. Known: {', '.join(GPUS)}. For another GPU name the nearest "
        "and override --gpu-memory-gib, --gpu-memory-gb-per-s, --gpu-tflops and "
        "--gpu-price-per-hour"
    )


def override_gpu(gpu: Gpu, **figures: float | None) -> Gpu:
    """``gpu`` with those of ``figures`` that are not None.

    Raises:
        ConfigError: a figure is not positive (a price may be 0).
    """
    given = {name: value for name, value in figures.items() if value is not None}
    for name, value in given.items():
        if not (0 < value < float("inf") or (name == "price_per_hour" and value == 0)):
            raise ConfigError(f"GPU figure {name} must be a positive number, got {value}")
    return replace(gpu, **given)  # type: ignore[arg-type]
