"""What a transport is, and between which replicas it can work.

The target asks for a chunk, and it travels in two halves. The source ``send_blocks``: it gives the
bytes away, and what that returns, a *parcel*, is its answer. The target ``recv_blocks``: it turns
the parcel back into bytes. For Ray objects the parcel is the data, for CUDA IPC it says where the
data lies in shared GPU memory, for NCCL that a ``send`` of so many bytes is waiting.

The few blocks that are left at the freeze always travel as a Ray object, with the message that
hands the request over, so that no transport can fail between freeze and commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mell_ray.errors import MigrationError

TransportName = Literal["objects", "cuda_ipc", "nccl"]
OBJECTS: TransportName = "objects"

# What ``send_blocks`` returns and ``recv_blocks`` takes; picklable.
Parcel = Any
# What opens a link at its other end; picklable.
Ticket = Any
# Bytes in order: 1-D numpy arrays of whole blocks in host memory, one torch tensor on a device.
Buffer = Any


class TransportError(MigrationError):
    """This way of moving blocks failed between these two replicas; another one may work."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What decides which transports reach a replica."""

    replica_id: str
    node_id: str
    device: str  # "cuda" or "cpu"
    gpu_uuid: str = ""  # of the physical GPU; "" on a CPU
    transports: tuple[TransportName, ...] = (OBJECTS,)  # what this process can use at all


class Transport(Protocol):
    """One replica's end of one way. Links are per peer and direction, and cached."""

    name: TransportName
    on_device: bool  # buffers are device memory

    def offer(self, peer: str) -> Ticket:
        """At the source: what ``join`` needs at both ends. None where no link is needed."""
        ...

    async def join(self, peer: str, ticket: Ticket, *, is_source: bool, timeout_s: float) -> None:
        """Open the link; both ends at once. Does nothing if it is open.

        Raises:
            TransportError: it could not be opened in time; nothing of it is left.
        """
        ...

    async def send_blocks(self, peer: str, data: Buffer, timeout_s: float) -> Parcel:
        """Give ``data`` away. It may be reused when the next but one chunk is asked for.

        Raises:
            TransportError: not sent; the link is gone.
        """
        ...

    async def recv_blocks(self, peer: str, parcel: Parcel, timeout_s: float) -> Buffer:
        """The bytes of a parcel; valid until the next call of this peer.

        Raises:
            TransportError: not received; the link is gone.
        """
        ...

    def abort(self, peer: str) -> None:
        """Drop the link, whatever it is doing; later use opens a new one."""
        ...


def reachable(name: TransportName, src: Endpoint, dst: Endpoint) -> bool:
    """Whether ``name`` can work between the two at all, by where they run.

    NCCL refuses two ranks on one physical GPU; CUDA IPC needs one node.
    """
    if name not in src.transports or name not in dst.transports:
        return False
    if name == OBJECTS:
        return True
    if src.device != "cuda" or dst.device != "cuda":
        return False
    if name == "cuda_ipc":
        return src.node_id == dst.node_id
    return bool(src.gpu_uuid) and bool(dst.gpu_uuid) and src.gpu_uuid != dst.gpu_uuid
