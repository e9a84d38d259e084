"""One copy of a model's weights per node: where the replicas of a node find each other's.

A weight image has no name in any file system. Who holds one writes down its process and the file's
number there; whoever needs the same reads that list, opens the file through /proc, and joins the
list. A list that names only the dead is as good as none. While one process loads a model, others
that want the same wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from mell_ray.config import EngineConfig
from mell_ray.engine.host_memory import free_bytes
from mell_ray.engine.model import LoadedModel
from mell_ray.engine.weight_image import ImageError, WeightImage

logger = logging.getLogger(__name__)

_KEPT_FREE = 0.05  # share of what is free that an image leaves alone


def image_key(source: str, config: EngineConfig, device: str) -> str:
    """Names what a model was loaded from: equal keys, equal images."""
    files = []
    if Path(source).is_dir():
        stats = [(path.name, path.stat()) for path in sorted(Path(source).iterdir())]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    parts = {
        "source": source,
        "files": files,
        "config": config.model_dump(
            include={"dtype", "revision", "max_model_len", "block_size", "weight_copies_share"},
            mode="json",
        ),
        "device": device,
        "versions": (torch.__version__, transformers.__version__),
        "code": _code_age(),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def load_shared(
    key: str, load: Callable[[], LoadedModel], directory: Path | None = None
) -> tuple[LoadedModel, WeightImage | None]:
    """The model of ``key``: from the image that another process of this node holds, else by
    ``load``, and then shared with those that come later. Without an image where that is impossible
    here (logged with the reason).

    Args:
        directory: where processes find each other; default: one of this user's own.
    """
    try:
        directory = directory or _directory()
        _sweep(directory, key)
        with _lock(directory / key) as file:
            return _load_locked(key, load, file)
    except (ImageError, OSError) as error:
        logger.warning("weights are not shared with other replicas: %s", error)
        return load(), None


def _load_locked(
    key: str, load: Callable[[], LoadedModel], file: int
) -> tuple[LoadedModel, WeightImage | None]:
    name = f"mell-weights-{key}"
    image = _found(name, file)
    if image is not None:
        model = image.load()
    else:
        model = load()
        try:
            image = WeightImage.of(model, name, int(free_bytes() * (1 - _KEPT_FREE)))
        except (ImageError, OSError) as error:
            logger.warning("weights are not shared with other replicas: %s", error)
            return model, None
        if model.device.type == "cpu":
            model = image.load()  # what was loaded first would be a second copy
    _join(image, name, file)
    return model, image


def _found(name: str, file: int) -> WeightImage | None:
    """The image of a process that lives."""
    for pid, fd in _holders(file):
        if _is_open(pid, fd, name):
            try:
                return WeightImage.open(f"/proc/{pid}/fd/{fd}")
            except ImageError as error:
                logger.info("an image cannot be used: %s", error)
    return None


def _holders(file: int) -> list[tuple[int, int]]:
    text = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
    pairs = [line.split() for line in text.splitlines()]
    return [(int(p[0]), int(p[1])) for p in pairs if len(p) == 2 and "".join(p).isdigit()]


def _join(image: WeightImage, name: str, file: int) -> None:
    mine = (os.getpid(), image.fd)
    others = [each for each in _holders(file) if each != mine and _is_open(*each, name)]
    text = "".join(f"{pid} {fd}\n" for pid, fd in [*others, mine]).encode()
    os.ftruncate(file, 0)
    os.pwrite(file, text, 0)


def _is_open(pid: int, fd: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"/memfd:{name} ")
    except OSError:
        return False


def _sweep(directory: Path, key: str) -> None:
    """Remove the lists of other models that name only the dead."""
    for path in directory.iterdir():
        if path.name == key:
            continue
        with suppress(OSError), _lock(path, wait=False) as file:
            name = f"mell-weights-{path.name}"
            if not any(_is_open(*each, name) for each in _holders(file)):
                path.unlink()


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """The list of holders, opened, nobody else's until the end.

    Raises:
        OSError: somebody has it now, and this was not to wait.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file
    finally:
        os.close(file)


def _directory() -> Path:
    """Of this user alone: what lies there says what memory to trust.

    Raises:
        ImageError: somebody else made it.
    """
    if not hasattr(os, "memfd_create"):
        raise ImageError("this system has no files in memory (memfd)")
    path = Path(tempfile.gettempdir()) / f"mell-ray-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    stat = path.lstat()
    if path.is_symlink() or stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise ImageError(f"{path} is open to others; remove it")
    return path


def _code_age() -> list[int]:
    """Changes when the code that lays weights out does."""
    import mell_kernels

    folders = [Path(__file__).parent, Path(mell_kernels.__path__[0])]
    files = [[file for file in each.iterdir() if file.suffix in (".py", ".so")] for each in folders]
    return [max(file.stat().st_mtime_ns for file in each) for each in files]
