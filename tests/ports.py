"""Ports for servers that must be told one before they start."""

from __future__ import annotations

import random
import socket

# Below those that the system gives to whoever asks for any, Ray's processes say, and above those
# of Ray's workers: between this look and the server's start nobody takes it.
FIRST, LAST = 20_000, 32_000


def free_port() -> int:
    while True:
        port = random.SystemRandom().randint(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
