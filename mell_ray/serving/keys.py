"""API keys: read from files and environment variables, kept only as digests. No Ray, no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mell_ray.config import KeySource
from mell_ray.errors import ConfigError

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
Stamp = tuple[tuple[str, int, int], ...]


class KeyRing:
    """The keys of one list.

    A changed file is read again within ``REFRESH_S``, so that keys are exchanged without a
    restart; where it cannot be read then, the old keys stay. The clear text is dropped at once.
    """

    def __init__(
        self,
        source: KeySource,
        where: str,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``where`` is the setting's path, for messages.

        Raises:
            ConfigError: a file or variable is missing or holds no key.
        """
        self._source = source
        self._where = where
        self._environment = environment
        self._clock = clock
        self._checked_s = clock()
        self._stamp = self._stat()
        self._digests = self._load()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: bytes) -> str | None:
        """An id of the key that tells nothing about it, or None where it is not in the list.

        Takes the same time whether and where it is in the list.
        """
        self._refresh()
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return digest.hex()[:12] if found else None

    def _refresh(self) -> None:
        now = self._clock()
        if not self._source.files or now - self._checked_s < REFRESH_S:
            return
        self._checked_s = now
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._digests = self._load()
                self._stamp = stamp
        except (ConfigError, OSError) as error:  # OSError: a file went between list and stat
            logger.error("API keys are left as they are: %s", error)

    def _stat(self) -> Stamp:
        stamps = []
        for path in self._paths():
            info = path.stat()
            stamps.append((str(path), info.st_mtime_ns, info.st_size))
        return tuple(stamps)

    def _load(self) -> tuple[bytes, ...]:
        digests = []
        for name in self._source.env:
            text = self._environment.get(name, "")
            digests += self._digests_of(text.replace(",", "\n"), f"environment variable {name}")
        for path in self._paths():
            digests += self._digests_of(self._read(path), str(path))
        return tuple(digests)

    def _read(self, path: Path) -> str:
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = type(error).__name__
            raise ConfigError(f"{self._where}: {path} cannot be read ({reason})") from None

    def _digests_of(self, text: str, origin: str) -> list[bytes]:
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{self._where}: {origin} holds no key; write one a line")
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"{self._where}: {origin}: a key may hold printable ASCII without blanks only"
                )
        return [hashlib.sha256(key.encode()).digest() for key in keys]

    def _paths(self) -> Iterator[Path]:
        for name in self._source.files:
            path = Path(name).expanduser()
            if path.is_dir():
                # A mounted secret keeps its versions in hidden folders.
                files = [p for p in sorted(path.iterdir()) if p.name[0] != "." and p.is_file()]
                if not files:
                    raise ConfigError(f"{self._where}: there is no file in {name!r}")
                yield from files
            elif path.is_file():
                yield path
            else:
                raise ConfigError(f"{self._where}: there is no file {name!r}")
