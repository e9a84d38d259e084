"""What is still anywhere in a served application once its clients have gone."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import ray

PATIENCE_S = 60.0
POLL_S = 0.2


async def left_over(client: httpx.AsyncClient, url: str, app: str) -> dict[str, Any]:
    """Blocks and requests still anywhere a minute after the last client, books of replicas that do
    not agree, and violations of exactly-once so far.

    Raises:
        httpx.HTTPError: the server does not come back in that time.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state = await _state(client, url, deadline)
        blocks = sum(replica["used_blocks"] for replica in state["replicas"])
        left = len(state["requests"]) + len(state["queued"])
        if not blocks + left or time.monotonic() > deadline:
            break
        await asyncio.sleep(POLL_S)
    broken = []
    for replica in state["replicas"]:
        if replica["state"] == "ready":
            try:
                await ray.get_actor(replica["id"], namespace=f"mell.{app}").check.remote()
            except (ValueError, ray.exceptions.RayError) as error:
                broken.append(f"{replica['id']}: {error}")
    return {
        "leaked_blocks": blocks,
        "leaked_requests": left,
        "broken_books": broken,
        "violations": state["exactly_once_violations"],
    }


async def _state(client: httpx.AsyncClient, url: str, deadline: float) -> dict[str, Any]:
    """What the server says of itself; it may just be coming back."""
    while True:
        try:
            answer = await client.get(f"{url}/mell/v1/state")
            return answer.raise_for_status().json()
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(POLL_S)
