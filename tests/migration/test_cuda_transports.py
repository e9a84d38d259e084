"""CUDA IPC and NCCL against a recording fake of CuPy's interface (see ``fake_cuda``)."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
import torch

from mell_ray.migration.transports import TransportError
from mell_ray.migration.transports.cuda_ipc import CudaIpcTransport
from mell_ray.migration.transports.nccl import NcclTransport
from tests.migration.fake_cuda import CudaError, Gpu

CPU = torch.device("cpu")


def nccl(gpu: Gpu) -> NcclTransport:
    return NcclTransport(gpu.nccl, gpu.cuda, torch, CPU, engine_stream=0)


def ipc(gpu: Gpu, slot_bytes: int = 64) -> CudaIpcTransport:
    return CudaIpcTransport(gpu.runtime, gpu.cuda, torch, CPU, slot_bytes, engine_stream=0)


def payload(seed: int, dtype: torch.dtype = torch.uint8, count: int = 32) -> torch.Tensor:
    torch.manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 255, (count,), dtype=torch.uint8)
    return torch.randn(count).to(dtype).view(torch.uint8)


async def join(source, target, timeout_s: float = 60.0) -> None:
    ticket = source.offer("b")
    await asyncio.gather(
        source.join("b", ticket, is_source=True, timeout_s=timeout_s),
        target.join("a", ticket, is_source=False, timeout_s=timeout_s),
    )


PAIRS = {"nccl": nccl, "cuda_ipc": ipc}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int8])
async def test_bytes_arrive_whatever_they_mean(kind: str, dtype: torch.dtype) -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g2")
    source, target = PAIRS[kind](a), PAIRS[kind](b)
    await join(source, target)
    for seed in range(5):
        data = payload(seed, torch.uint8 if dtype == torch.int8 else dtype, 16)
        parcel = await source.send_blocks("b", data, 60.0)
        assert torch.equal(await target.recv_blocks("a", parcel, 60.0), data)


async def test_ipc_works_on_one_gpu_and_nccl_refuses_it() -> None:
    a, b = Gpu("p1", "same"), Gpu("p2", "same")
    await join(ipc(a), ipc(b))
    with pytest.raises(TransportError, match="Duplicate GPU"):
        await join(nccl(a), nccl(b))


async def test_nccl_exchanges_a_byte_before_the_link_counts_as_open() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g2")
    await join(nccl(a), nccl(b))
    assert a.log == [("init", 0), ("send", 1), ("recv", 1)]
    assert b.log == [("init", 1), ("send", 1), ("recv", 1)]


async def test_nccl_peer_that_never_joins_costs_only_the_timeout() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g2")
    source, target = nccl(a), nccl(b)
    ticket = source.offer("b")
    with pytest.raises(TransportError, match="did not join"):
        await source.join("b", ticket, is_source=True, timeout_s=0.05)
    with pytest.raises(TransportError, match="no link"):
        await source.send_blocks("b", payload(0), 60.0)
    # The peer comes late: what it gets is aborted at this end as soon as it exists. Whether its
    # own byte is through by then is a race that it may lose.
    with suppress(TransportError):
        await target.join("a", ticket, is_source=False, timeout_s=0.2)
    while ("abort", 0) not in a.log:
        await asyncio.sleep(0.001)
    await join(source, target)
    while ("abort", 1) not in b.log:
        await asyncio.sleep(0.001)
    parcel = await source.send_blocks("b", payload(1), 60.0)
    assert torch.equal(await target.recv_blocks("a", parcel, 60.0), payload(1))


async def test_nccl_message_that_never_comes_aborts_that_link_alone() -> None:
    a, b, c = Gpu("p1", "g1"), Gpu("p2", "g2"), Gpu("p3", "g3")
    source, target, other = nccl(a), nccl(b), nccl(c)
    await join(source, target)
    ticket = source.offer("c")
    await asyncio.gather(
        source.join("c", ticket, is_source=True, timeout_s=60),
        other.join("a", ticket, is_source=False, timeout_s=60),
    )
    with pytest.raises(TransportError, match="no end after"):
        await target.recv_blocks("a", 32, 0.05)
    assert b.log[-1] == ("abort", 1)
    with pytest.raises(TransportError, match="no link"):
        await target.recv_blocks("a", 32, 0.05)
    parcel = await source.send_blocks("c", payload(2), 60.0)
    assert torch.equal(await other.recv_blocks("a", parcel, 60.0), payload(2))


async def test_nccl_size_mismatch_is_an_error_not_garbage() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g2")
    source, target = nccl(a), nccl(b)
    await join(source, target)
    await source.send_blocks("b", payload(0, count=32), 60.0)
    with pytest.raises(TransportError, match="32 elements sent, 16 received"):
        await target.recv_blocks("a", 16, 60.0)


async def test_nccl_link_is_cached_and_aborted_once() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g2")
    source, target = nccl(a), nccl(b)
    await join(source, target)
    source.abort("b")
    source.abort("b")
    assert [entry for entry in a.log if entry[0] == "abort"] == [("abort", 0)]
    await join(source, target)  # a new communicator, the old one aborted at the other end too
    assert ("abort", 1) in b.log


async def test_ipc_slots_take_turns() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g1")
    source, target = ipc(a, 64), ipc(b, 64)
    await join(source, target)
    parcels = [await source.send_blocks("b", payload(i), 60.0) for i in range(2)]
    assert [parcel.offset for parcel in parcels] == [0, 64]
    for i, parcel in enumerate(parcels):
        assert torch.equal(await target.recv_blocks("a", parcel, 60.0), payload(i))
    assert (await source.send_blocks("b", payload(2), 60.0)).offset == 0


async def test_ipc_refusals_are_transport_errors() -> None:
    a, b = Gpu("p1", "g1"), Gpu("p2", "g1")
    source, target = ipc(a, 64), ipc(b, 64)
    with pytest.raises(TransportError, match="of this process"):
        await source.join("a", source.offer("a"), is_source=False, timeout_s=1)
    with pytest.raises(TransportError, match="nothing is lent"):
        await source.send_blocks("b", payload(0), 60.0)
    await join(source, target)
    with pytest.raises(TransportError, match="slot"):
        await source.send_blocks("b", payload(0, count=65), 60.0)

    def broken(name: str) -> None:
        if name == "memcpy":
            raise CudaError("cudaErrorIllegalAddress")

    a.fail = broken
    with pytest.raises(TransportError, match="IllegalAddress"):
        await source.send_blocks("b", payload(0), 60.0)
    a.fail = lambda _: None
    with pytest.raises(TransportError, match="nothing is lent"):
        await source.send_blocks("b", payload(0), 60.0)
    target.abort("a")
    assert b.log[-1][0] == "close"
    await join(source, target)
    parcel = await source.send_blocks("b", payload(3), 60.0)
    assert torch.equal(await target.recv_blocks("a", parcel, 60.0), payload(3))


@pytest.mark.gpu
async def test_one_rank_sends_to_itself_on_a_real_gpu() -> None:
    """What CuPy offers is what the transport expects: constants, streams, grouped send and recv."""
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import nccl as real

    stream = cupy.cuda.Stream(non_blocking=True)
    comm = real.NcclCommunicator(1, real.get_unique_id(), 0)
    out = torch.arange(64, dtype=torch.uint8, device="cuda")
    back = torch.zeros_like(out)
    torch.cuda.synchronize()
    real.groupStart()
    comm.send(out.data_ptr(), 64, real.NCCL_UINT8, 0, stream.ptr)
    comm.recv(back.data_ptr(), 64, real.NCCL_UINT8, 0, stream.ptr)
    real.groupEnd()
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    event.synchronize()
    comm.check_async_error()
    assert torch.equal(out, back)
    comm.abort()
