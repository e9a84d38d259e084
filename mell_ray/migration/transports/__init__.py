"""How KV blocks get from one replica to another: one protocol, several ways."""

from mell_ray.migration.transports.base import (
    OBJECTS,
    Endpoint,
    Transport,
    TransportError,
    reachable,
)
from mell_ray.migration.transports.links import LinkTable

__all__ = ["OBJECTS", "Endpoint", "LinkTable", "Transport", "TransportError", "reachable"]
