"""Calls from an ingress to the Router, patient while the Router is being replaced."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from mell_ray.errors import OverloadedError
from mell_ray.serving.place_socket import PlaceLine
from mell_ray.serving.ray_errors import unwrap
from mell_ray.serving.wire import Lease, PlaceRequest

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
PAUSE_S = 0.1


class RouterClient:
    """The Router's methods; a MellError raised there is raised here."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._line = PlaceLine(lambda: self.call("place_socket"))

    async def place(self, request: PlaceRequest) -> Lease:
        """By socket where there is one, else through Serve; asking twice does no harm."""
        lease = await self._line.place(request)
        return lease if lease is not None else await self.call("place", request)

    async def call(self, method: str, *args: Any) -> Any:
        """Call, and call again when the Router died meanwhile: every method may be repeated."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await getattr(self._handle, method).remote(*args)
            except RayTaskError as error:
                raise unwrap(error) from None
            except BackPressureError:
                raise OverloadedError("the Router is overloaded", retry_after_s=1) from None
            except RayActorError:
                if time.monotonic() > deadline:
                    raise OverloadedError("the Router does not answer", retry_after_s=5) from None
                logger.warning("the Router is gone; asking its successor")
                await asyncio.sleep(PAUSE_S)
