"""API keys: read from files and environment variables, kept only as digests. No Ray, no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mell_ray.config import KeySource
from mell_ray.errors import ConfigError

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
_WEIGHT = re.compile(r"weight=([0-9]{1,9}(?:\.[0-9]{1,9})?)")
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
        self._weights: dict[str, float] = {}
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
        return _id(digest) if found else None

    def weight(self, key_id: str) -> float:
        """Of the key with this id, 1 unless its line says otherwise."""
        return self._weights.get(key_id, 1.0)

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
        weights: dict[bytes, float] = {}
        for name in self._source.env:
            text = self._environment.get(name, "")
            weights |= self._weights_in(text.replace(",", "\n"), f"environment variable {name}")
        for path in self._paths():
            weights |= self._weights_in(self._read(path), str(path))
        self._weights = {_id(digest): weight for digest, weight in weights.items()}
        return tuple(weights)

    def _read(self, path: Path) -> str:
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = type(error).__name__
            raise ConfigError(f"{self._where}: {path} cannot be read ({reason})") from None

    def _weights_in(self, text: str, origin: str) -> dict[bytes, float]:
        """Digest of each key, and its weight."""
        lines = [line.strip() for line in text.splitlines()]
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise ConfigError(f"{self._where}: {origin} holds no key; write one a line")
        weights = {}
        for entry in entries:
            key, _, rest = entry.partition(" ")
            weight = _weight(rest)
            if not key.isascii() or not key.isprintable() or weight is None:
                raise ConfigError(
                    f"{self._where}: {origin}: a key may hold printable ASCII without blanks only; "
                    "behind it may stand ' weight=NUMBER', more than 0"
                )
            weights[hashlib.sha256(key.encode()).digest()] = weight
        return weights

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


def _id(digest: bytes) -> str:
    return digest.hex()[:12]


def _weight(text: str) -> float | None:
    """What stands behind a key; None: something else than a weight."""
    if not text:
        return 1.0
    match = _WEIGHT.fullmatch(text)
    weight = float(match[1]) if match else 0.0
    return weight if weight > 0 else None
