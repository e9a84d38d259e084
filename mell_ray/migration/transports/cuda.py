"""Which CUDA transports this process can offer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mell_ray.migration.transports.base import Transport, TransportName

logger = logging.getLogger(__name__)


def cuda_transports(
    allowed: Sequence[TransportName], slot_bytes: int
) -> tuple[dict[TransportName, Transport], str]:
    """Those among ``allowed`` that work here, and the uuid of the GPU. Needs CuPy; without it KV
    travels as Ray objects."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
    found: dict[TransportName, Transport] = {}
    try:
        import cupy
    except ImportError as error:
        logger.warning("KV between GPUs travels as Ray objects, because CuPy is missing: %s", error)
        return found, uuid
    device = torch.device("cuda", 0)
    stream = torch.cuda.current_stream(device).cuda_stream
    if "cuda_ipc" in allowed:
        from mell_ray.migration.transports.cuda_ipc import CudaIpcTransport

        found["cuda_ipc"] = CudaIpcTransport(
            cupy.cuda.runtime, cupy.cuda, torch, device, slot_bytes, stream
        )
    if "nccl" in allowed:
        try:
            from cupy.cuda import nccl
        except ImportError as error:
            logger.warning("CuPy has no NCCL: %s", error)
        else:
            from mell_ray.migration.transports.nccl import NcclTransport

            found["nccl"] = NcclTransport(nccl, cupy.cuda, torch, device, stream)
    return found, uuid
