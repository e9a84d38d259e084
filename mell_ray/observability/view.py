"""What the status page is sent: the state of ``GET /mell/v1/state`` cut to what a page can show."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Requests drawn one by one, over all GPUs; what is beyond is drawn as one block a GPU.
MAX_BLOCKS_DRAWN = 2400
MIN_PER_GPU = 8
SHOWN_ID = 40


def gpu_views(state: dict[str, Any], migrating: Collection[str]) -> list[dict[str, Any]]:
    """Each GPU with its requests, the largest first: ``[id, blocks, migrations, migrating]``.

    ``rest`` stands for the smallest where there are too many: ``[how many, blocks]``.
    """
    replicas = state["replicas"]
    limit = max(MIN_PER_GPU, MAX_BLOCKS_DRAWN // max(1, len(replicas)))
    placed: dict[str, list[dict[str, Any]]] = {replica["id"]: [] for replica in replicas}
    for request in state["requests"]:
        placed[request["replica"]].append(request)
    return [_gpu(replica, placed[replica["id"]], limit, migrating) for replica in replicas]


def _gpu(
    replica: dict[str, Any],
    requests: list[dict[str, Any]],
    limit: int,
    migrating: Collection[str],
) -> dict[str, Any]:
    requests.sort(key=lambda request: (-request["blocks"], request["id"]))
    drawn, rest = requests[:limit], requests[limit:]
    return {
        "id": replica["id"],
        "model": replica["model"],
        "state": replica["state"],
        "node": (replica["node"] or "")[:8],
        "capacity": replica["capacity_blocks"],
        "used": replica["used_blocks"],
        "cached": replica["cached_blocks"],
        "running": replica["running"],
        "waiting": replica["waiting"],
        "requests": [
            [
                shown_id(request["id"]),
                request["blocks"],
                request["migrations"],
                int(request["id"] in migrating),
            ]
            for request in drawn
        ],
        "rest": [len(rest), sum(request["blocks"] for request in rest)],
    }


def shown_id(request_id: str) -> str:
    """Clients may choose long ids; a page has little room. The end tells choices apart."""
    if len(request_id) <= SHOWN_ID:
        return request_id
    return f"{request_id[: SHOWN_ID - 13]}…{request_id[-12:]}"
