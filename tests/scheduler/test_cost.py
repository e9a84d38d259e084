"""Migration cost: which way is faster, and what is learnt from finished migrations."""

from __future__ import annotations

import pytest

from mell_ray.scheduler import CostConfig, ModelLimits
from mell_ray.scheduler.cost import CostModel
from mell_ray.scheduler.events import MigrationDone
from mell_ray.scheduler.state import Gpu, Pool

POOL = Pool("m", ModelLimits(0, 4), {})
SRC = Gpu("a", POOL, 1000, "node-1", 100)
DST = Gpu("b", POOL, 1000, "node-2", 100)
CONFIG = CostConfig(
    bytes_per_token=100, link_bytes_per_s=1e6, link_latency_s=0.01, prefill_tokens_per_s=5000
)


def model(**changes: object) -> CostModel:
    return CostModel(CostConfig(**{**CONFIG.__dict__, **changes}), tokens_per_unit=1)


def sent(nbytes: int, seconds: float, copy_s: float = 0.0) -> MigrationDone:
    return MigrationDone("r", SRC.id, DST.id, "kv", 2000, nbytes, seconds, copy_s)


def prefilled(tokens: int, seconds: float, copy_s: float = 0.0) -> MigrationDone:
    return MigrationDone("r", SRC.id, DST.id, "token", tokens, 0, seconds, copy_s)


def test_kv_is_chosen_where_the_link_is_faster_than_prefill() -> None:
    chosen = model().choose(SRC, DST, 2000)
    assert chosen.mode == "kv"
    assert chosen.seconds == pytest.approx(0.01 + 2000 * 100 / 1e6)
    assert model(link_bytes_per_s=1e5).choose(SRC, DST, 2000).mode == "token"


def test_short_requests_go_as_tokens_where_latency_dominates() -> None:
    slow_start = model(link_latency_s=1.0)
    assert slow_start.choose(SRC, DST, 100).mode == "token"
    assert slow_start.choose(SRC, DST, 100_000).mode == "kv"


def test_cached_prefix_makes_both_ways_cheaper() -> None:
    cost = model(link_bytes_per_s=4e5)
    assert cost.choose(SRC, DST, 2000).mode == "token"
    assert cost.choose(SRC, DST, 2000, cached=1500).seconds == pytest.approx(0.1, rel=0.05)
    assert cost.choose(SRC, DST, 2000, cached=3000).seconds < 0.01


def test_hybrid_splits_so_that_both_ends_finish_together() -> None:
    options = {e.mode: e for e in model(hybrid=True).estimates(SRC, DST, 4000)}
    hybrid = options["hybrid"]
    by_kv = 0.01 + hybrid.kv_tokens / 1e4
    by_prefill = (4000 - hybrid.kv_tokens) / 5000
    assert by_kv == pytest.approx(by_prefill, rel=1e-3)
    assert hybrid.seconds == pytest.approx(by_kv, rel=1e-3)
    assert hybrid.seconds < min(options["kv"].seconds, options["token"].seconds)


def test_mode_can_be_forced() -> None:
    cost = CostModel(CONFIG, 1, "token")
    assert cost.choose(SRC, DST, 2000).mode == "token"


def test_observations_move_the_estimates_to_the_truth() -> None:
    cost = model()
    for _ in range(40):
        cost.observe(SRC, DST, sent(200_000, 0.01 + 200_000 / 5e6))
        cost.observe(SRC, DST, prefilled(2000, 0.002 + 2000 / 20_000))
    assert cost.bandwidth(SRC, DST) == pytest.approx(5e6, rel=0.02)
    assert cost.prefill_rate(DST) == pytest.approx(20_000, rel=0.02)
    assert cost.price() == pytest.approx(1 / 5e4, rel=0.05)


def test_the_first_migration_of_each_mode_replaces_the_guess() -> None:
    """A link three orders of magnitude slower than guessed must not be believed fast."""
    cost = model(link_bytes_per_s=5e9, prefill_tokens_per_s=1e6)
    cost.observe(SRC, DST, sent(200_000, 2.05, copy_s=2.0))
    cost.observe(SRC, DST, prefilled(2000, 1.05, copy_s=1.0))
    assert cost.bandwidth(SRC, DST) == pytest.approx(1e5)
    assert cost.prefill_rate(DST) == pytest.approx(2000)
    assert cost.choose(SRC, DST, 1000).mode == "token"


def test_what_every_migration_takes_is_learnt_apart_from_the_rate() -> None:
    cost = model()
    for size in (100, 1000, 10_000):
        cost.observe(SRC, DST, sent(100 * size, 0.2 + size / 1e4, copy_s=size / 1e4))
        cost.observe(SRC, DST, prefilled(size, 0.05 + size / 5e3, copy_s=size / 5e3))
    kv, token = cost.estimates(SRC, DST, 500)
    assert kv.seconds == pytest.approx(0.25)
    assert token.seconds == pytest.approx(0.15)
    assert cost.choose(SRC, DST, 500).mode == "token"
    assert cost.choose(SRC, DST, 5000).mode == "kv"


def test_hybrid_is_chosen_only_where_it_is_clearly_faster() -> None:
    fast_link = model(hybrid=True, prefill_tokens_per_s=500)
    assert fast_link.choose(SRC, DST, 4000).mode == "kv"
    assert model(hybrid=True, prefill_tokens_per_s=8000).choose(SRC, DST, 4000).mode == "hybrid"


def test_a_link_never_seen_is_judged_by_the_others() -> None:
    cost = model()
    for _ in range(40):
        cost.observe(SRC, DST, sent(200_000, 0.01 + 200_000 / 5e6))
    assert cost.bandwidth(DST, SRC) == pytest.approx(5e6, rel=0.05)


def test_one_odd_observation_does_not_throw_the_estimate() -> None:
    cost = model()
    for _ in range(40):
        cost.observe(SRC, DST, sent(200_000, 0.01 + 0.2))
    before = cost.bandwidth(SRC, DST)
    cost.observe(SRC, DST, sent(200_000, 60.0))
    assert cost.bandwidth(SRC, DST) > before / 2
    cost.observe(SRC, DST, sent(0, 0.0))
    cost.observe(SRC, DST, prefilled(0, 1.0))
    assert cost.bandwidth(SRC, DST) > before / 2


def test_a_gpu_that_is_gone_is_forgotten() -> None:
    cost = model()
    for _ in range(40):
        cost.observe(SRC, DST, prefilled(2000, 2000 / 500))
        cost.observe(DST, SRC, prefilled(2000, 2000 / 5000))
    assert cost.prefill_rate(DST) == pytest.approx(500, rel=0.05)
    cost.forget(DST)
    assert cost.prefill_rate(DST) > 1000


def test_long_prompts_take_longer_per_token() -> None:
    cost = model(prefill_tokens_per_s=1000.0)
    cost.set_attention(1000)
    token = {n: seconds(cost, n) for n in (1000, 4000)}
    assert token[4000] == pytest.approx(4.0 * (1 + 2) + 0.002, rel=1e-3)
    assert token[1000] == pytest.approx(1.0 * (1 + 0.5) + 0.002, rel=1e-3)
    # What lies at the target already need not be computed, but is attended to.
    assert seconds(cost, 4000, cached=2000) == pytest.approx(2.0 * (1 + 3) + 0.002, rel=1e-3)


def test_the_rate_of_one_length_is_learnt_from_another() -> None:
    cost = model()
    cost.set_attention(1000)
    cost.observe(SRC, DST, prefilled(500, 0.625, copy_s=0.625))
    assert seconds(cost, 3000) == pytest.approx(3.0 * (1 + 1.5), rel=0.01)
    behind = MigrationDone("r", SRC.id, DST.id, "token", 1000, 0, 3.5, 3.5, cached_tokens=2000)
    cost.observe(SRC, DST, behind)  # the same rate again
    assert seconds(cost, 3000) == pytest.approx(3.0 * (1 + 1.5), rel=0.01)


def seconds(cost: CostModel, tokens: int, cached: int = 0) -> float:
    [found] = [e for e in cost.estimates(SRC, DST, tokens, cached) if e.mode == "token"]
    return found.seconds
