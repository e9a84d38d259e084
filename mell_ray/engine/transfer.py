"""Small host data on its way to a device, without waiting for what the device is doing."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the host, on ``device``. A copy from pageable memory would wait for
    everything queued before it; torch keeps the pinned buffer until the copy has been made."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
