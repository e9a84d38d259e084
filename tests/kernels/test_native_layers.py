"""Compiled decoder layers against the same in float64, on every kind of CPU that this one stands
for."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mell_kernels import native
from mell_kernels.int8 import Int8Pool, block_nbytes

from tests.kernels.native_cases import (
    EPS,
    PRODUCT,
    Batch,
    Case,
    attention,
    expected,
    native_layers,
    plain_layers,
    threads,
)

pytestmark = pytest.mark.usefixtures("compiled")

# Of the size of what a step adds to a row, and of what it adds on average, as it may add little to
# one: several products one after the other, and a softmax between.
ROW = 6e-3

DECODES = ((5, 1), (0, 1), (17, 1), (30, 1), (3, 1))
MIXED = ((5, 1), (0, 9), (21, 13), (8, 1), (0, 30), (33, 2), (1, 1))
LONG = ((700, 1), (511, 1), (1023, 1), (1500, 1), (512, 1), (4, 1))

CASES = {
    "decodes": Case(DECODES),
    "one": Case(((0, 1),)),
    "prefill": Case(((0, 70),)),
    "chunk": Case(((45, 31),)),
    "mixed": Case(MIXED),
    "everything": Case(MIXED, qk_norm=True, factor=0.4, gelu=True, biased=True, window=6),
    "qk-norm": Case(MIXED, qk_norm=True),
    "not-rotated": Case(MIXED, rotates=False),
    "alternating": Case(MIXED, window=5, alternates=True, layers=4),
    "factor": Case(MIXED, factor=0.25),
    "gelu": Case(MIXED, gelu=True),
    "biased": Case(MIXED, biased=True),
    "window-1": Case(MIXED, window=1),
    "window-8": Case(MIXED, window=8),
    "blocks-of-1": Case(MIXED, block_size=1),
    "blocks-of-3": Case(MIXED, block_size=3, window=7),
    "blocks-of-7": Case(MIXED, block_size=7),
    "blocks-of-64": Case(MIXED, block_size=64),
    "dim-64": Case(MIXED, dim=64, heads=3, kv_heads=3),
    "dim-96": Case(MIXED, dim=96, heads=2, kv_heads=1),
    "dim-128": Case(MIXED, dim=128, heads=2, kv_heads=2),
    "dim-256": Case(MIXED, dim=256, heads=2, kv_heads=1),
    "many-queries-a-key": Case(MIXED, heads=26, kv_heads=2),
    "one-kv-head": Case(MIXED, heads=7, kv_heads=1),
    "odd-sizes": Case(MIXED, hidden=50, width=38, factor=0.3),
    "tiny-sizes": Case(MIXED, hidden=2, width=2),
    "wide": Case(MIXED, hidden=322, width=610),
    "long": Case(LONG, block_size=16),
    "long-and-new": Case((*LONG, (600, 20), (0, 3)), block_size=16),
    "long-window": Case(LONG, block_size=16, window=600),
    "long-narrow-window": Case(LONG, block_size=16, window=30),
    "long-window-of-pieces": Case(LONG, block_size=5, window=1024),
    "long-many-queries-a-key": Case(LONG, block_size=16, heads=13, kv_heads=1),
    "long-chunk": Case(((1100, 20), (515, 14)), block_size=16, window=520),
}


def check_rows(batch: Batch, got: torch.Tensor, want: torch.Tensor) -> None:
    """Rows of residual streams, ``got`` those that were wanted."""
    want, before = want[batch.wanted], batch.x.double()[batch.wanted]
    assert got.shape == want.shape
    error, size = (got - want).norm(dim=1), (want - before).norm(dim=1)
    assert (error <= ROW * (size + size.mean()) / 2).all()


def run(layers: native.Layers, batch: Batch) -> torch.Tensor:
    return layers.run(batch.x.clone(), *batch.angles, batch.pool, batch.meta, batch.wanted)


def check(case: Case, wanted: list[int] | None = None) -> None:
    plain, batch = plain_layers(case), Batch(case)
    if wanted is not None:
        batch.wanted = torch.tensor(wanted, dtype=torch.int64)
    before = batch.memory.clone()
    got = run(native_layers(case, plain), batch)

    def attend(layer: int, query: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        check_kv(batch.written(layer), torch.stack(kv))
        return attention(case, batch, layer, query)

    check_rows(batch, got, expected(case, plain, batch, attend))
    blocks, offsets = batch.slots
    batch.pool[blocks, :, :, offsets] = torch.nan  # as it was
    assert torch.equal(batch.memory.view(torch.int16), before.view(torch.int16))


def check_kv(got: torch.Tensor, want: torch.Tensor) -> None:
    """The nearest bfloat16, 2^-8 away at most, of what is nearly the same. Were they cut off, all
    together would be twice as far away."""
    error = (got.double() - want).abs()
    room = 2.0**-8 * want.abs() + PRODUCT * want.norm(dim=-1, keepdim=True)
    assert (error <= room).all()
    assert error.square().mean() <= 2.5e-3**2 * want.square().mean()


@pytest.mark.parametrize("name", CASES)
def test_layers(name: str) -> None:
    check(CASES[name])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    length = st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 1, 2, 5, 12, 25]))
    return Case(
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=7))),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 14)),
        dim=draw(st.sampled_from([32, 64, 96, 128])),
        hidden=2 * draw(st.integers(1, 60)),
        width=2 * draw(st.integers(1, 60)),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 6, 16, 31, 32])),
        window=draw(st.none() | st.integers(1, 70)),
        alternates=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        rotates=draw(st.booleans()),
        factor=draw(st.sampled_from([1.0, 0.3])),
        gelu=draw(st.booleans()),
        biased=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=30)
@given(case=cases(), data=st.data())
def test_any_layers(case: Case, data: st.DataObject) -> None:
    tokens = sum(new for _, new in case.lengths)
    wanted = [row for row in range(tokens) if data.draw(st.booleans())]
    with threads(data.draw(st.integers(1, 3))):
        check(case, wanted)


@pytest.mark.parametrize("wanted", [[], [0], [56], [0, 9, 22, 23, 53, 55, 56], list(range(57))])
def test_wanted_rows(wanted: list[int]) -> None:
    assert sum(new for _, new in MIXED) == 57
    check(CASES["mixed"], wanted)


@pytest.mark.parametrize("name", ["mixed", "long-and-new"])
def test_threads_change_nothing(name: str) -> None:
    case = CASES[name]
    layers = native_layers(case, plain_layers(case))
    results = []
    for count in (1, 2, 3):
        batch = Batch(case)
        with threads(count):
            results.append((run(layers, batch), batch.memory.view(torch.int16)))
    for result, memory in results[1:]:
        assert torch.equal(result, results[0][0])
        assert torch.equal(memory, results[0][1])


@pytest.mark.parametrize("largest", [12.0, 3e4])
@pytest.mark.parametrize("gelu", [False, True])
def test_activations(gelu: bool, largest: float) -> None:
    """Layers whose gates are given numbers, all else zeros and ones."""
    size = 64
    case = Case(((0, 3),), heads=1, kv_heads=1, hidden=size, width=size, layers=1, gelu=gelu)
    (layer,) = plain_layers(case)
    weights = {name: torch.zeros_like(weight) for name, (weight, _) in layer.matrices.items()}
    gates = (torch.linspace(-1, 1, size).pow(3) * largest).bfloat16()
    weights["gate_up"][:size, 0], weights["gate_up"][size:, 1] = gates, 1.0
    weights["down"] = torch.eye(size).bfloat16()
    layer.matrices = {name: (weight, None) for name, weight in weights.items()}
    for gain in layer.gains.values():
        gain.fill_((1 + EPS) ** 0.5)  # of rows of ones, a norm makes ones
    batch = Batch(case)
    batch.x.fill_(1.0)
    added = run(native_layers(case, [layer]), batch) - 1
    activation = torch.nn.functional.gelu if gelu else torch.nn.functional.silu
    how = {"approximate": "tanh"} if gelu else {}
    exact = activation(gates.double(), **how)
    assert ((added - exact).abs() <= 6e-4 * exact.abs() + 1e-6 * largest).all()


def rows_of(batch: Batch, sequence: int) -> slice:
    start, stop = batch.meta.cu_seqlens_q[sequence : sequence + 2].tolist()
    return slice(start, stop)


def picked(batch: Batch, order: list[int]) -> Batch:
    """Sequences of ``batch`` in this order, on the same pool."""
    some = object.__new__(Batch)
    meta = batch.meta
    rows = torch.cat([torch.arange(len(batch.x))[rows_of(batch, i)] for i in order])
    lengths = (meta.cu_seqlens_q[1:] - meta.cu_seqlens_q[:-1])[order]
    some.meta = replace(
        meta,
        cu_seqlens_q=torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        seq_lens=meta.seq_lens[order],
        block_tables=meta.block_tables[order],
        slot_mapping=meta.slot_mapping[rows],
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(meta.seq_lens[order].max()),
    )
    some.x, some.pool = batch.x[rows], batch.pool
    some.angles = batch.angles[0][rows], batch.angles[1][rows]
    some.wanted = torch.arange(len(rows))
    return some


@pytest.mark.parametrize("name", ["mixed", "everything", "long-and-new"])
def test_the_order_of_sequences_changes_nothing(name: str) -> None:
    case = CASES[name]
    layers, batch = native_layers(case, plain_layers(case)), Batch(case)
    result = run(layers, batch)
    order = torch.randperm(len(case.lengths), generator=torch.Generator().manual_seed(5)).tolist()
    other = picked(batch, order)
    permuted = run(layers, other)
    for place, sequence in enumerate(order):
        assert torch.equal(permuted[rows_of(other, place)], result[rows_of(batch, sequence)])


@pytest.mark.parametrize("name", ["mixed", "everything", "long-and-new"])
def test_a_sequence_alone_gets_what_it_gets_among_others(name: str) -> None:
    case = CASES[name]
    layers, batch = native_layers(case, plain_layers(case)), Batch(case)
    result = run(layers, batch)
    for sequence in range(len(case.lengths)):
        rows = rows_of(batch, sequence)
        alone = run(layers, picked(batch, [sequence]))
        check_rows(picked(batch, [sequence]), alone, result[rows].double())


@pytest.mark.parametrize("name", ["mixed", "long-and-new"])
def test_a_sequence_of_no_numbers_harms_no_other(name: str) -> None:
    case = CASES[name]
    layers, batch = native_layers(case, plain_layers(case)), Batch(case)
    good = run(layers, batch)
    for sequence in (0, 3):
        spoilt = Batch(case)
        index, offset = spoilt.places(sequence, int(spoilt.meta.seq_lens[sequence]))
        spoilt.pool[index, :, :, offset] = torch.nan
        rows = rows_of(spoilt, sequence)
        spoilt.x[rows] = torch.nan
        result = run(layers, spoilt)
        assert result[rows].isnan().all()
        result[rows] = good[rows]
        assert torch.equal(result, good)


def test_steps_of_all_sizes_one_after_the_other() -> None:
    """With room to work in that grows and stays."""
    plain = plain_layers(CASES["mixed"])
    layers = native_layers(CASES["mixed"], plain)
    for lengths in (DECODES, ((0, 70),), DECODES, MIXED, ((9, 1),), ((600, 1), (2, 5)), MIXED):
        case = Case(lengths)
        batch = Batch(case)
        got = run(layers, batch)
        fresh = run(native_layers(case, plain), Batch(case))
        assert torch.equal(got, fresh)


def test_two_models_by_turns() -> None:
    """Each with its number of threads."""
    pair = [CASES["mixed"], CASES["everything"]]
    layers = [native_layers(case, plain_layers(case)) for case in pair]
    alone = [run(each, Batch(case)) for case, each in zip(pair, layers, strict=True)]
    for _ in range(3):
        for count, case, each, result in zip((1, 2), pair, layers, alone, strict=True):
            with threads(count):
                assert torch.equal(run(each, Batch(case)), result)


def test_two_models_at_the_same_time() -> None:
    """In two threads of Python, each with threads of its own."""
    pair = [CASES["long-and-new"], CASES["everything"]]
    layers = [native_layers(case, plain_layers(case)) for case in pair]
    alone = [run(each, Batch(case)) for case, each in zip(pair, layers, strict=True)]
    start = threading.Barrier(2, timeout=60)

    def use(index: int) -> list[torch.Tensor]:
        batches = [Batch(pair[index]) for _ in range(8)]
        with threads(2 + index):
            start.wait()
            return [run(layers[index], batch) for batch in batches]

    with ThreadPoolExecutor(2) as pool:
        for results, result in zip(pool.map(use, range(2)), alone, strict=True):
            assert all(torch.equal(each, result) for each in results)


def test_what_is_pickled_comes_back() -> None:
    case = CASES["everything"]
    layers = native_layers(case, plain_layers(case))
    result = run(layers, Batch(case))
    found = pickle.loads(pickle.dumps(layers))
    assert torch.equal(run(found, Batch(case)), result)


def test_pools_that_suit() -> None:
    case = CASES["mixed"]
    layers, pool = native_layers(case, plain_layers(case)), Batch(case).pool
    assert layers.suits(pool)
    assert not layers.suits(pool.float())
    assert not layers.suits(pool.half())
    assert not layers.suits(pool[:, :1].contiguous())
    assert not layers.suits(pool[:, :, :1].contiguous())
    assert not layers.suits(pool[..., :16].contiguous())
    assert not layers.suits(pool[:, :, :, ::2])
    block = pool.shape[1:]
    memory = torch.zeros(len(pool), block_nbytes(*block), dtype=torch.uint8)
    assert not layers.suits(Int8Pool(memory, tuple(block), torch.bfloat16))


# --- around another's attention --------------------------------------------------------------


def around(case: Case, layers: native.Layers, batch: Batch, fails: bool = False) -> torch.Tensor:
    """With the same attention, of what is rounded to bfloat16."""
    called: list[int] = []

    def attend(layer: int, *qkv: torch.Tensor, **how: Any) -> torch.Tensor:
        window = case.window_of(layer)
        scale = pytest.approx(case.scale)
        assert how == {"scale": scale, "window": window, "softcap": None, "sinks": None}
        counts = (case.heads, case.kv_heads, case.kv_heads)
        for part, heads in zip(qkv, counts, strict=True):
            assert part.dtype == torch.bfloat16
            assert part.shape == (len(batch.x), heads, case.dim)
        called.append(layer)
        if fails and layer:
            raise ZeroDivisionError
        query, key, value = qkv
        blocks, offsets = batch.slots
        batch.pool[blocks, layer, 0, offsets] = key
        batch.pool[blocks, layer, 1, offsets] = value
        return attention(case, batch, layer, query).bfloat16()

    result = layers.run_around(batch.x.clone(), *batch.angles, attend, batch.wanted)
    assert called == list(range(case.layers))
    return result


@pytest.mark.parametrize("wanted", [None, [], [2, 30]])
@pytest.mark.parametrize("name", ["decodes", "mixed", "everything", "alternating", "odd-sizes"])
def test_around_anothers_attention(name: str, wanted: list[int] | None) -> None:
    case = CASES[name]
    plain, batch = plain_layers(case), Batch(case)
    if wanted is not None:
        batch.wanted = torch.tensor([row for row in wanted if row < len(batch.x)]).long()
    got = around(case, native_layers(case, plain), batch)

    def attend(layer: int, query: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        check_kv(batch.written(layer), torch.stack(kv))
        return attention(case, batch, layer, query)

    check_rows(batch, got, expected(case, plain, batch, attend))


def test_an_attention_that_fails_spoils_no_later_step() -> None:
    case = CASES["everything"]
    layers = native_layers(case, plain_layers(case))
    results = [run(layers, Batch(case)), around(case, layers, Batch(case))]
    with pytest.raises(ZeroDivisionError):
        around(case, layers, Batch(case), fails=True)
    assert torch.equal(run(layers, Batch(case)), results[0])
    with pytest.raises(ZeroDivisionError):
        around(case, layers, Batch(case), fails=True)
    assert torch.equal(around(case, layers, Batch(case)), results[1])
