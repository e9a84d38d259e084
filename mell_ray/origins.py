"""Origins of web pages, as browsers name them."""

from __future__ import annotations

import re

ANY = "*"
_ORIGIN = re.compile(
    r"(?P<bare>(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]))"
    r"(:(?P<port>[0-9]{1,5}))?"
)
_USUAL_PORTS = {"http": 80, "https": 443}


def check_origins(origins: list[str]) -> list[str]:
    """``origins``. What differs from what browsers send by a letter is never equal to it, and its
    page would wonder why.

    Raises:
        ValueError: one is no origin, or not written as browsers do, or others stand beside ``*``.
    """
    if ANY in origins and len(origins) > 1:
        raise ValueError(f"{ANY!r} allows every origin; leave the others out")
    for origin in origins:
        if origin != ANY and (sent := _as_sent(origin)) != origin:
            raise ValueError(f"browsers send {sent!r}, not {origin!r}")
    return origins


def _as_sent(origin: str) -> str:
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise ValueError(
            f"{origin!r} is not an origin; write scheme://host or scheme://host:port, without a "
            f"path, or only {ANY!r}"
        )
    sent = match["bare"].lower()
    if match["port"] and int(match["port"]) != _USUAL_PORTS.get(match["scheme"].lower()):
        sent += f":{match['port']}"
    return sent
