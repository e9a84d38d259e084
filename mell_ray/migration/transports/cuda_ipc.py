"""CUDA IPC between two processes of one node: the source lends memory, the target copies from it.

The source has an arena of its own (not the caching allocator's, whose blocks are parts of larger
allocations) with two slots per peer; a chunk is copied into a slot, and its place travels as the
parcel. A slot is written again for the next chunk but one, which the driver asks for only when the
target has taken the first. Two replicas on one GPU can use it too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from mell_ray.migration.transports.base import TransportError, TransportName
from mell_ray.migration.transports.device import DeviceStream, ReceiveBuffers

logger = logging.getLogger(__name__)

NAME: TransportName = "cuda_ipc"
SLOTS = 2
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


@dataclass(frozen=True, slots=True)
class IpcTicket:
    """Where the arena of one (source, target) pair is."""

    handle: bytes
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class IpcParcel:
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Arena:
    pointer: int
    turn: int = 0


class CudaIpcTransport:
    """One replica's ends of its IPC links.

    Args:
        runtime: ``cupy.cuda.runtime``.
        cuda: ``cupy.cuda``.
        slot_bytes: the largest chunk.
        engine_stream: pointer of the stream that the engine computes on.
    """

    name = NAME
    on_device = True

    def __init__(
        self,
        runtime: Any,
        cuda: Any,
        torch: Any,
        device: Any,
        slot_bytes: int,
        engine_stream: int,
    ) -> None:
        self._runtime = runtime
        self._slot_bytes = slot_bytes
        self._stream = DeviceStream(cuda, engine_stream)
        self._lent: dict[str, _Arena] = {}
        self._borrowed: dict[str, int] = {}  # peer -> address here
        self._received = ReceiveBuffers(torch, device)

    def offer(self, peer: str) -> IpcTicket:
        if peer not in self._lent:
            self._lent[peer] = _Arena(self._runtime.malloc(SLOTS * self._slot_bytes))
        handle = self._runtime.ipcGetMemHandle(self._lent[peer].pointer)
        return IpcTicket(handle, self._slot_bytes)

    async def join(
        self, peer: str, ticket: IpcTicket, *, is_source: bool, timeout_s: float
    ) -> None:
        del timeout_s
        if is_source:
            return
        self._give_back(peer)
        try:
            self._borrowed[peer] = self._runtime.ipcOpenMemHandle(ticket.handle)
        except Exception as error:
            raise TransportError(f"cuda_ipc from {peer}: {error}") from None

    async def send_blocks(self, peer: str, data: Any, timeout_s: float) -> IpcParcel:
        arena, nbytes = self._lent.get(peer), data.numel()
        if arena is None:
            raise TransportError(f"cuda_ipc: nothing is lent to {peer}")
        if nbytes > self._slot_bytes:
            raise TransportError(f"cuda_ipc: {nbytes} bytes in a slot of {self._slot_bytes}")
        offset = arena.turn * self._slot_bytes
        arena.turn = (arena.turn + 1) % SLOTS
        await self._copy(peer, arena.pointer + offset, data.data_ptr(), nbytes, timeout_s)
        return IpcParcel(offset, nbytes)

    async def recv_blocks(self, peer: str, parcel: IpcParcel, timeout_s: float) -> Any:
        address = self._borrowed.get(peer)
        if address is None:
            raise TransportError(f"cuda_ipc: nothing is borrowed from {peer}")
        data = self._received.take(peer, parcel.nbytes)
        await self._copy(peer, data.data_ptr(), address + parcel.offset, parcel.nbytes, timeout_s)
        return data

    async def _copy(self, peer: str, to: int, frm: int, nbytes: int, timeout_s: float) -> None:
        try:
            self._stream.after_engine()
            self._runtime.memcpyAsync(to, frm, nbytes, DEVICE_TO_DEVICE, self._stream.stream.ptr)
            await self._stream.finished(timeout_s)
        except Exception as error:
            self.abort(peer)
            raise TransportError(f"cuda_ipc with {peer}: {error}") from None

    def abort(self, peer: str) -> None:
        self._give_back(peer)
        self._received.drop(peer)
        arena = self._lent.pop(peer, None)
        if arena is not None:
            self._runtime.free(arena.pointer)

    def _give_back(self, peer: str) -> None:
        address = self._borrowed.pop(peer, None)
        if address is not None:
            try:
                self._runtime.ipcCloseMemHandle(address)
            except Exception as error:  # the lender may be dead, and the address with it
                logger.info("memory borrowed from %s could not be given back: %s", peer, error)
