"""What must hold in the scheduler's books at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mell_ray.scheduler.state import Gpu, Pool, Request

if TYPE_CHECKING:
    from mell_ray.scheduler.ledger import Ledger


def check_scheduler(
    ledgers: Mapping[str, Ledger], requests: Mapping[str, Request], gpus: Mapping[str, Gpu]
) -> None:
    """Raises AssertionError naming what is wrong."""
    booked = [r for ledger in ledgers.values() for r in ledger.pool.requests.values()]
    assert len(booked) == len(requests), "requests lost or doubled"
    assert all(requests.get(r.id) is r for r in booked), "request known to one book only"
    listed = [g for ledger in ledgers.values() for g in ledger.pool.gpus.values()]
    assert len(listed) == len(gpus), "GPUs lost or doubled"
    for ledger in ledgers.values():
        for gpu in ledger.pool.gpus.values():
            _check_gpu(gpu)
        _check_index(ledger.pool)
        for request in ledger.pool.requests.values():
            _check_request(request, ledger)
        limits = ledger.pool.limits
        assert ledger.fleet.total() <= max(limits.max_gpus, len(ledger.pool.gpus)), "fleet too big"


def _check_gpu(gpu: Gpu) -> None:
    assert gpu.load == sum(r.need for r in gpu.requests), f"{gpu.id}: planned load is wrong"
    held = sum(r.need for r in gpu.residents) + sum(r.need for r in gpu.reserved)
    assert gpu.held == held, f"{gpu.id}: booked {gpu.held}, its requests need {held}"
    assert all(r.gpu is gpu for r in gpu.residents), f"{gpu.id}: resident runs elsewhere"
    assert all(r.dst is gpu for r in gpu.reserved), f"{gpu.id}: reservation of another GPU"
    assert all(r.plan is gpu for r in gpu.requests), f"{gpu.id}: plan of another GPU"
    for request in gpu.inbound:
        assert request.plan is gpu, f"{gpu.id}: {request.id} is not planned to come"
        assert request.gpu is not gpu, f"{gpu.id}: {request.id} is there already"
        assert request.dst is None, f"{gpu.id}: {request.id} is on its way already"


def _check_index(pool: Pool) -> None:
    expected = sorted(gpu.key for gpu in pool.gpus.values() if gpu.state == "ready")
    assert pool.keys == expected, "index of GPUs is out of order"
    for key in pool.keys:
        assert pool.at(key).key == key, "index points to another GPU"


def _check_request(request: Request, ledger: Ledger) -> None:
    name = request.id
    if request.gpu is not None:
        assert request in request.gpu.residents, f"{name}: unknown where it runs"
        assert request.plan is not None, f"{name}: runs without a plan"
        assert request not in ledger.line, f"{name}: runs and waits"
    else:
        assert request.dst is None, f"{name}: in flight from nowhere"
        assert request in ledger.line, f"{name}: neither runs nor waits"
    if request.dst is not None:
        assert request.plan is request.dst, f"{name}: in flight to where it is not planned"
        assert request in ledger.executor.in_flight, f"{name}: in flight unknown"
    assert request.need >= request.size, f"{name}: booked for less than it holds"
