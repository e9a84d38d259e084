"""The operator's view: every replica and every request, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mell_ray.serving.fleet import Replica


def state_snapshot(replicas: Iterable[Replica], queued: Iterable[str]) -> dict[str, Any]:
    """``GET /mell/v1/state``: replicas in order of birth, requests by replica.

    A request that is being handed over may be on two replicas for a moment; the one with the
    higher generation owns it and is shown.
    """
    listed = list(replicas)
    requests: dict[str, dict[str, Any]] = {}
    for replica in listed:
        for request in _requests(replica):
            known = requests.get(request["id"])
            if known is None or known["generation"] < request["generation"]:
                requests[request["id"]] = request
    return {
        "replicas": [_replica(replica) for replica in listed],
        "requests": list(requests.values()),
        "queued": list(queued),
    }


def _replica(replica: Replica) -> dict[str, Any]:
    info = replica.info
    stats = replica.report.stats if replica.report else None
    return {
        "id": replica.replica_id,
        "model": replica.model_id,
        "state": replica.state,
        "outdated": replica.outdated,
        "node": info.node_id if info else None,
        "pid": info.pid if info else None,
        "device": info.device if info else None,
        "kernels": info.kernels if info else None,
        "capacity_blocks": info.capacity_blocks if info else 0,
        "used_blocks": stats.used_blocks if stats else 0,
        "cached_blocks": stats.cached_blocks if stats else 0,
        "running": stats.running if stats else 0,
        "waiting": stats.waiting if stats else 0,
        "preemptions": stats.preemptions if stats else 0,
    }


def _requests(replica: Replica) -> Iterable[dict[str, Any]]:
    if replica.report is None:
        return
    for info in replica.report.sequences:
        if info.status != "reserved":
            yield {
                "id": info.request_id,
                "model": replica.model_id,
                "replica": replica.replica_id,
                "generation": info.generation,
                "tokens": info.num_tokens,
                "blocks": info.num_blocks,
                "migrations": info.migrations,
            }
