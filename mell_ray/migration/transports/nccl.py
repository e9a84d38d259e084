"""NCCL between two GPUs, through CuPy's ``NcclCommunicator``.

One communicator of two ranks per (source, target), made on demand and cached. It is dropped alone
when its peer dies or hangs: there is no group that others depend on. What CuPy and NCCL allow
shapes the rest:

* Creating a communicator blocks, without a timeout, until both ranks are there: it is done in a
  thread, and a join that takes too long leaves that thread behind.
* The first message of a pair makes the connection and blocks until the peer takes part, so both
  ends exchange one byte before the link counts as open. From then on ``send`` and ``recv`` only
  give work to a stream.
* A dead peer is not reported reliably, so completion is polled against a deadline, and a link that
  misses it is aborted. ``abort`` comes before ``destroy``, which may hang otherwise.
* Two communicators in use on one GPU at once may wait for each other for ever: the Migrator lets
  one chunk at a time use NCCL at any one replica.
* Blocks travel as bytes, whatever the dtype of the KV: NCCL does not compute with them.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mell_ray.migration.transports.base import TransportError, TransportName
from mell_ray.migration.transports.device import DeviceStream, ReceiveBuffers

NAME: TransportName = "nccl"


@dataclass(slots=True)
class _Link:
    comm: Any
    rank: int
    stream: DeviceStream
    sending: Any = None  # the buffer of the last send, kept until the next


class NcclTransport:
    """One replica's ends of its NCCL links.

    Args:
        nccl: ``cupy.cuda.nccl``.
        cuda: ``cupy.cuda``.
        torch: for device buffers.
        engine_stream: pointer of the stream that the engine computes on.
    """

    name = NAME
    on_device = True

    def __init__(self, nccl: Any, cuda: Any, torch: Any, device: Any, engine_stream: int) -> None:
        self._nccl = nccl
        self._cuda = cuda
        self._torch = torch
        self._device = device
        self._engine_stream = engine_stream
        self._links: dict[tuple[str, bool], _Link] = {}  # (peer, whether this is the source)
        self._received = ReceiveBuffers(torch, device)

    def offer(self, peer: str) -> bytes:
        """A new communicator's id. The process that makes it also hosts the meeting point of the
        two ranks, which is why it is the source's, rank 0."""
        self._drop(peer, is_source=True)
        return bytes(_unsigned(value) for value in self._nccl.get_unique_id())

    async def join(self, peer: str, ticket: bytes, *, is_source: bool, timeout_s: float) -> None:
        self._drop(peer, is_source=is_source)
        unique = tuple(_signed(value) for value in ticket)
        rank = 0 if is_source else 1
        done: asyncio.Future[_Link] = asyncio.get_running_loop().create_future()
        thread = threading.Thread(
            target=self._open, args=(unique, rank, done), name="mell-nccl-join", daemon=True
        )
        thread.start()
        try:
            async with asyncio.timeout(timeout_s):
                link = await asyncio.shield(done)
            await link.stream.finished(timeout_s, lambda: _check(link.comm))
        except TimeoutError:
            done.add_done_callback(_abort_late)
            raise TransportError(f"nccl: {peer} did not join in {timeout_s:.1f} s") from None
        except TransportError:
            _abort(done.result().comm)
            raise
        self._links[peer, is_source] = link

    def _open(self, unique: tuple[int, ...], rank: int, done: asyncio.Future[_Link]) -> None:
        """In a thread of its own: meet the peer and exchange one byte."""
        loop = done.get_loop()
        try:
            with self._cuda.Device(self._device.index or 0):
                comm = self._nccl.NcclCommunicator(2, unique, rank)
                link = _Link(comm, rank, DeviceStream(self._cuda, self._engine_stream))
                link.sending = self._torch.zeros(2, dtype=self._torch.uint8, device=self._device)
                link.stream.after_engine()
                out, back, stream = link.sending[:1], link.sending[1:], link.stream.stream.ptr
                self._nccl.groupStart()
                comm.send(out.data_ptr(), 1, self._nccl.NCCL_UINT8, 1 - rank, stream)
                comm.recv(back.data_ptr(), 1, self._nccl.NCCL_UINT8, 1 - rank, stream)
                self._nccl.groupEnd()
        except Exception as error:
            answer = functools.partial(_fail, done, TransportError(f"nccl: {error}"))
        else:
            answer = functools.partial(done.set_result, link)
        with suppress(RuntimeError):  # its loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(answer)

    async def send_blocks(self, peer: str, data: Any, timeout_s: float) -> int:
        """Give a device tensor of bytes to the link's stream; returns its length. The tensor is
        kept until the next send: the one before has arrived by then."""
        del timeout_s
        link = self._link(peer, is_source=True)
        nbytes = data.numel()
        try:
            _check(link.comm)
            link.stream.after_engine()
            link.comm.send(
                data.data_ptr(),
                nbytes,
                self._nccl.NCCL_UINT8,
                1 - link.rank,
                link.stream.stream.ptr,
            )
        except Exception as error:
            self.abort(peer)
            raise TransportError(f"nccl to {peer}: {error}") from None
        link.sending = data
        return nbytes

    async def recv_blocks(self, peer: str, parcel: int, timeout_s: float) -> Any:
        link = self._link(peer, is_source=False)
        data = self._received.take(peer, parcel)
        try:
            _check(link.comm)
            link.stream.after_engine()
            link.comm.recv(
                data.data_ptr(),
                parcel,
                self._nccl.NCCL_UINT8,
                1 - link.rank,
                link.stream.stream.ptr,
            )
            await link.stream.finished(timeout_s, lambda: _check(link.comm))
        except Exception as error:
            self.abort(peer)
            raise TransportError(f"nccl from {peer}: {error}") from None
        return data

    def abort(self, peer: str) -> None:
        for is_source in (True, False):
            self._drop(peer, is_source=is_source)
        self._received.drop(peer)

    def _drop(self, peer: str, *, is_source: bool) -> None:
        link = self._links.pop((peer, is_source), None)
        if link is not None:
            _abort(link.comm)

    def _link(self, peer: str, *, is_source: bool) -> _Link:
        link = self._links.get((peer, is_source))
        if link is None:
            raise TransportError(f"nccl: there is no link with {peer}")
        return link


def _check(comm: Any) -> None:
    comm.check_async_error()


def _abort(comm: Any) -> None:
    comm.abort()


def _fail(done: asyncio.Future[_Link], error: TransportError) -> None:
    done.set_exception(error)
    done.exception()  # looked at, also where nobody waits any more


def _abort_late(done: asyncio.Future[_Link]) -> None:
    """The peer came after all, too late: nobody waits for this communicator any more."""
    if not done.cancelled() and done.exception() is None:
        _abort(done.result().comm)


def _unsigned(value: int) -> int:
    return value & 0xFF


def _signed(value: int) -> int:
    return value - 256 if value > 127 else value
