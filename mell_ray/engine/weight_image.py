"""A loaded model as one file in memory, from which other processes of the node build the same.

What lies in it is what the engine runs from: weights converted, joined and packed. The file is a
memfd: it has no name that could be left behind, and ends with the last process that holds it,
however that ends. A CPU engine runs from the file's own pages, so that any number of replicas hold
one copy; for a GPU it is the copy in host memory that comes back after a sleep.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import logging
import mmap
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from mell_kernels import packed_memory

from mell_ray.engine.model import LoadedModel
from mell_ray.errors import MellError

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_HEADER = len(b"mellw001") + 8
_MAGIC = b"mellw001"
_MADV_POPULATE_READ = 22
_CHUNK = 1 << 28


class ImageError(MellError):
    """The model cannot be shared between processes; says why."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where the bytes of one storage or packed matrix lie, counted from the end of the header."""

    offset: int
    nbytes: int
    device: str  # type of the device it was on
    shape: tuple[int, ...] = ()  # of a packed matrix, as what follows
    dtype: torch.dtype | None = None
    description: bytes = b""


class WeightImage:
    """Holds the file open. ``nbytes``: its whole size."""

    def __init__(self, fd: int, skeleton: bytes, pieces: list[_Piece], start: int) -> None:
        self.fd = fd
        self.nbytes = os.fstat(fd).st_size
        self._skeleton = skeleton
        self._pieces = pieces
        self._start = start
        self._pinned: mmap.mmap | None = None

    @classmethod
    def of(cls, model: LoadedModel, name: str, room: int) -> WeightImage:
        """Write ``model`` into a new file of at most ``room`` bytes, called ``name`` in /proc.

        Raises:
            ImageError: it does not fit, or cannot be taken apart.
        """
        writer = _Writer()
        try:
            writer.dump(model)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ImageError(f"the model cannot be taken apart: {error}") from error
        meta = pickle.dumps((writer.skeleton(), writer.pieces))
        start = _aligned(_HEADER + len(meta))
        total = start + writer.end
        if total > room:
            raise ImageError(
                f"its weights take {total >> 20} MiB, and {max(0, room) >> 20} MiB are free"
            )
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, total)
            _write(fd, 0, memoryview(_MAGIC + len(meta).to_bytes(8, "little") + meta))
            for piece, source in zip(writer.pieces, writer.sources, strict=True):
                _copy_out(fd, start + piece.offset, source, piece.nbytes)
            # Nobody can change what others run from; a GPU's driver wants writable pages.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            if all(piece.device == "cpu" for piece in writer.pieces):
                seals |= fcntl.F_SEAL_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, writer.skeleton(), writer.pieces, start)

    @classmethod
    def open(cls, path: str) -> WeightImage:
        """An image of this user's that another process holds.

        Raises:
            ImageError: there is none at ``path``, or it is not complete.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error
        try:
            if os.fstat(fd).st_uid != os.getuid():
                raise ImageError(f"{path} belongs to somebody else")
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_GROW:
                raise ImageError(f"{path} is not complete")
            header = os.pread(fd, _HEADER, 0)
            if header[: len(_MAGIC)] != _MAGIC:
                raise ImageError(f"{path} is no weight image of this version")
            size = int.from_bytes(header[len(_MAGIC) :], "little")
            skeleton, pieces = pickle.loads(os.pread(fd, size, _HEADER))
        except OSError as error:
            os.close(fd)
            raise ImageError(f"{path}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, skeleton, pieces, _aligned(_HEADER + size))

    def load(self) -> LoadedModel:
        """The model, on the device it was on; on a CPU its tensors are the file's pages."""
        on_cpu = all(piece.device == "cpu" for piece in self._pieces)
        memory = self._map_private() if on_cpu else self._map_pinned()
        reader = _Reader(io.BytesIO(self._skeleton), memory, self._pieces, self._start)
        model = reader.load()
        if not on_cpu:
            torch.cuda.synchronize()
        return model

    def close(self) -> None:
        """Let go of the file. Models that were loaded from it go on."""
        os.close(self.fd)

    def _map_private(self) -> mmap.mmap:
        """Pages are shared until somebody writes: such a page then is the writer's own."""
        memory = mmap.mmap(self.fd, self.nbytes, flags=mmap.MAP_PRIVATE)
        with suppress(OSError):  # an older kernel: pages come one by one as they are touched
            memory.madvise(_MADV_POPULATE_READ)
        return memory

    def _map_pinned(self) -> mmap.mmap:
        """Mapped once and known to the driver from then on, so that it reads without a detour."""
        if self._pinned is None:
            self._pinned = mmap.mmap(self.fd, self.nbytes)
            address = torch.frombuffer(self._pinned, dtype=torch.uint8).data_ptr()
            error = int(torch.cuda.cudart().cudaHostRegister(address, self.nbytes, 0))
            if error:
                logger.warning("weights cannot be pinned (CUDA error %d): waking is slower", error)
        return self._pinned


class _Writer(pickle.Pickler):
    """Pickles everything but the bytes of tensors, of which it keeps a list."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        super().__init__(self._out, protocol=pickle.HIGHEST_PROTOCOL)
        self.pieces: list[_Piece] = []
        self.sources: list[Any] = []  # storages and packed matrices, in the same order
        self.end = 0
        self._known: dict[tuple[str, int], int] = {}

    def skeleton(self) -> bytes:
        return self._out.getvalue()

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, torch.Tensor) and packed_memory.is_packed(obj):
            if not packed_memory.can_adopt():
                raise pickle.PicklingError(
                    f"its packed matrices cannot share memory with torch {torch.__version__}"
                )
            address, nbytes = packed_memory.extent(obj)
            described = packed_memory.description(obj)
            extra = (tuple(obj.shape), obj.dtype, described)
            return ("packed", self._add("cpu", address, nbytes, obj, extra))
        if isinstance(obj, torch.storage.TypedStorage):
            storage = obj._untyped_storage
            return ("storage", self._add_storage(storage), obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            return ("untyped", self._add_storage(obj))
        return None

    def _add_storage(self, storage: torch.UntypedStorage) -> int:
        return self._add(storage.device.type, storage.data_ptr(), storage.nbytes(), storage)

    def _add(
        self, device: str, address: int, nbytes: int, source: Any, extra: tuple[Any, ...] = ()
    ) -> int:
        key = (device, address)
        if nbytes and key in self._known:
            return self._known[key]
        index = len(self.pieces)
        self.pieces.append(_Piece(self.end, nbytes, device, *extra))
        self.sources.append(source)
        self.end = _aligned(self.end + nbytes)
        self._known[key] = index
        return index


class _Reader(pickle.Unpickler):
    def __init__(
        self, source: io.BytesIO, memory: mmap.mmap, pieces: list[_Piece], start: int
    ) -> None:
        super().__init__(source)
        self._memory = memory
        self._pieces = pieces
        self._start = start
        self._made: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, index = pid[:2]
        made = self._made.get(index)
        if made is None:
            made = self._made[index] = self._make(kind, self._pieces[index])
        if kind == "storage":
            return torch.storage.TypedStorage(wrap_storage=made, dtype=pid[2], _internal=True)
        return made

    def _make(self, kind: str, piece: _Piece) -> Any:
        if not piece.nbytes:
            return torch.UntypedStorage(0, device=piece.device)
        at = self._start + piece.offset
        data = torch.frombuffer(self._memory, dtype=torch.uint8, count=piece.nbytes, offset=at)
        if kind == "packed":
            assert piece.dtype is not None
            return packed_memory.adopt(data, piece.shape, piece.dtype, piece.description)
        if piece.device != "cpu":
            data = data.to(piece.device, non_blocking=True)
        return data.untyped_storage()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _copy_out(fd: int, offset: int, source: Any, nbytes: int) -> None:
    if isinstance(source, torch.UntypedStorage) and source.device.type != "cpu":
        flat = torch.empty(0, dtype=torch.uint8, device=source.device).set_(source)
        for begin in range(0, nbytes, _CHUNK):
            part = flat[begin : begin + _CHUNK].cpu()
            _write(fd, offset + begin, part.numpy().data)
        return
    if isinstance(source, torch.UntypedStorage):
        address = source.data_ptr()
    else:
        address = packed_memory.extent(source)[0]
    if nbytes:
        _write(fd, offset, memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B"))


def _write(fd: int, offset: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(fd, data[:_CHUNK], offset)
        data, offset = data[done:], offset + done
