"""What the CUDA transports need of CuPy: order on streams, and waiting that ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from mell_ray.migration.transports.base import TransportError

POLL_S = 0.0005


class DeviceStream:
    """A stream of a transport's own, ordered against the engine's by events.

    Copies must not run ahead of the kernels that fill their source or read their target, and the
    engine must not be stopped for them; so each copy waits, on the GPU, for what the engine has
    been given so far, and the host only polls. ``engine_stream``: pointer of the engine's stream.
    """

    def __init__(self, cuda: Any, engine_stream: int) -> None:
        self._cuda = cuda
        self._engine = cuda.ExternalStream(engine_stream)
        self.stream = cuda.Stream(non_blocking=True)

    def after_engine(self) -> None:
        """Order everything that follows here behind the engine's work so far."""
        event = self._cuda.Event(disable_timing=True)
        event.record(self._engine)
        self.stream.wait_event(event)

    async def finished(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all that has been given to this stream is done.

        Args:
            check: called while waiting; raises if the work cannot end well any more.

        Raises:
            TransportError: not in time.
        """
        event = self._cuda.Event(disable_timing=True)
        event.record(self.stream)
        deadline = time.monotonic() + timeout_s
        while not event.done:
            check()
            if time.monotonic() > deadline:
                raise TransportError(f"no end after {timeout_s:.1f} s")
            await asyncio.sleep(POLL_S)


class ReceiveBuffers:
    """Device memory for incoming chunks, one buffer per peer, used again for the next chunk."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch = torch
        self._device = device
        self._of: dict[str, Any] = {}

    def take(self, peer: str, nbytes: int) -> Any:
        """Memory for a chunk from ``peer``."""
        buffer = self._of.get(peer)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
            self._of[peer] = buffer
        return buffer[:nbytes]

    def drop(self, peer: str) -> None:
        """Nothing more comes from ``peer``."""
        self._of.pop(peer, None)
