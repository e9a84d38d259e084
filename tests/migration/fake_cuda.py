"""CuPy's interface to CUDA and NCCL as far as the transports use it, on host memory.

It records what is called and refuses what the real one refuses: two ranks on one GPU, a
communicator whose peer never comes (it blocks), ``destroy`` before ``abort``, use after ``abort``,
messages whose sizes or dtypes differ, opening an IPC handle in the process that made it.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


class NcclError(RuntimeError):
    pass


class CudaError(RuntimeError):
    pass


@dataclass
class Message:
    pointer: int
    count: int
    dtype: int


@dataclass
class Pair:
    """Two ranks that have the same unique id."""

    devices: dict[int, str] = field(default_factory=dict)
    both: threading.Event = field(default_factory=threading.Event)
    sent: dict[int, list[tuple[Message, Event]]] = field(default_factory=lambda: {0: [], 1: []})
    awaited: dict[int, list[tuple[Message, Event]]] = field(default_factory=lambda: {0: [], 1: []})
    aborted: set[int] = field(default_factory=set)
    broken: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def match(self) -> None:
        """Deliver what both ends have agreed on, in order."""
        for rank in (0, 1):
            while self.sent[rank] and self.awaited[1 - rank]:
                out, out_done = self.sent[rank].pop(0)
                back, back_done = self.awaited[1 - rank].pop(0)
                if (out.count, out.dtype) != (back.count, back.dtype):
                    self.broken = f"{out.count} elements sent, {back.count} received"
                    return
                ctypes.memmove(back.pointer, out.pointer, out.count)
                out_done.work_done = back_done.work_done = True


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        del disable_timing
        self.work_done = True
        self._behind: list[Event] = []

    def record(self, stream: Stream) -> None:
        self._behind = list(stream.work)

    @property
    def done(self) -> bool:
        return self.work_done and all(event.done for event in self._behind)


class Stream:
    """Work in order; ``ptr`` identifies it."""

    _serial = itertools.count(1000)
    by_ptr: ClassVar[dict[int, Stream]] = {}

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking, "a blocking stream waits for the engine's and makes it wait"
        self.ptr = next(self._serial)
        self.by_ptr[self.ptr] = self
        self.work: list[Event] = []
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        self.work.append(event)


class ExternalStream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr
        self.work: list[Event] = []


class Gpu:
    """One process's view: its ``cuda``, ``runtime`` and ``nccl`` modules."""

    unique = itertools.count(1)
    pairs: ClassVar[dict[tuple[int, ...], Pair]] = {}
    memory: ClassVar[dict[bytes, tuple[str, Any]]] = {}

    def __init__(self, process: str, uuid: str) -> None:
        self.process, self.uuid = process, uuid
        self.log: list[tuple[Any, ...]] = []
        self.arenas: dict[int, Any] = {}
        self.cuda = self
        self.runtime = self
        self.nccl = self
        self.NCCL_UINT8 = 1
        self.Event, self.Stream, self.ExternalStream = Event, Stream, ExternalStream
        self.fail: Callable[[str], None] = lambda _: None
        self._group = threading.local()  # as NCCL's: of the calling thread

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    # --- NCCL ------------------------------------------------------------------------------

    def get_unique_id(self) -> tuple[int, ...]:
        number = next(self.unique)
        ident = tuple([number % 128, number // 128, -5, -128, 127] + [0] * 123)
        self.pairs[ident] = Pair()
        return ident

    def NcclCommunicator(self, ndev: int, ident: tuple[int, ...], rank: int) -> Communicator:
        assert ndev == 2
        pair = self.pairs[ident]
        with pair.lock:
            pair.devices[rank] = self.uuid
            if len(pair.devices) == 2:
                pair.both.set()
        pair.both.wait()  # as the real one: for ever
        if pair.devices[0] == pair.devices[1]:
            raise NcclError("ncclInvalidUsage: Duplicate GPU detected")
        self.log.append(("init", rank))
        return Communicator(self, pair, rank)

    def groupStart(self) -> None:
        self._group.calls = []

    def groupEnd(self) -> None:
        calls, self._group.calls = self._group.calls, None
        for call in calls:
            call()

    # --- memory ----------------------------------------------------------------------------

    def malloc(self, nbytes: int) -> int:
        arena = torch.zeros(nbytes, dtype=torch.uint8)
        self.arenas[arena.data_ptr()] = arena
        return arena.data_ptr()

    def free(self, pointer: int) -> None:
        del self.arenas[pointer]

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        handle = f"{self.process}:{pointer}".encode()
        self.memory[handle] = (self.process, self.arenas[pointer])
        return handle

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        self.fail("open")
        owner, arena = self.memory[handle]
        if owner == self.process:
            raise CudaError("cudaErrorDeviceUninitialized: the handle is of this process")
        self.log.append(("open", handle))
        return arena.data_ptr()

    def ipcCloseMemHandle(self, pointer: int) -> None:
        self.log.append(("close", pointer))

    def memcpyAsync(self, to: int, frm: int, nbytes: int, kind: int, stream: int) -> None:
        self.fail("memcpy")
        assert kind == 3, "device to device"
        assert stream in Stream.by_ptr, "not on the transport's own stream"
        assert Stream.by_ptr[stream].waited, "not ordered behind the engine"
        ctypes.memmove(to, frm, nbytes)


class Communicator:
    def __init__(self, gpu: Gpu, pair: Pair, rank: int) -> None:
        self._gpu, self._pair, self._rank = gpu, pair, rank

    def _usable(self) -> None:
        if self._rank in self._pair.aborted:
            raise NcclError("the communicator was aborted")

    def check_async_error(self) -> None:
        self._usable()
        if self._pair.broken:
            raise NcclError(self._pair.broken)

    def _give(self, what: str, pointer: int, count: int, dtype: int, stream: int) -> None:
        assert dtype == self._gpu.NCCL_UINT8, "KV travels as bytes"
        assert Stream.by_ptr[stream].waited, "not ordered behind the engine"
        event = Event()
        event.work_done = False
        Stream.by_ptr[stream].work.append(event)
        self._gpu.log.append((what, count))
        with self._pair.lock:
            queue = self._pair.sent if what == "send" else self._pair.awaited
            queue[self._rank].append((Message(pointer, count, dtype), event))
            self._pair.match()

    def _call(self, *args: Any) -> None:
        self._usable()
        calls = getattr(self._gpu._group, "calls", None)
        if calls is None:
            self._give(*args)
        else:
            calls.append(lambda: self._give(*args))

    def send(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert peer == 1 - self._rank
        self._call("send", pointer, count, dtype, stream)

    def recv(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert peer == 1 - self._rank
        self._call("recv", pointer, count, dtype, stream)

    def abort(self) -> None:
        self._usable()
        self._gpu.log.append(("abort", self._rank))
        with self._pair.lock:  # what is pending never touches memory again
            self._pair.aborted.add(self._rank)
            self._pair.sent[self._rank].clear()
            self._pair.awaited[self._rank].clear()

    def destroy(self) -> None:
        if self._rank not in self._pair.aborted:
            raise NcclError("destroy would hang: abort first")
