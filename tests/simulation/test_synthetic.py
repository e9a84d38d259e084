from __future__ import annotations

import itertools
import statistics

import pytest

from mell_ray.errors import ConfigError
from mell_ray.simulation.synthetic import generate, parse_spec


def rows_of(settings: str) -> list:
    return generate(parse_spec(f"synthetic:{settings}"))


def gap_variation(rows: list) -> float:
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(rows)]
    return statistics.stdev(gaps) / statistics.mean(gaps)


def test_poisson_has_the_rate_and_the_variation_of_a_poisson_process() -> None:
    rows = rows_of("poisson,rate=20,duration=500")
    assert len(rows) == pytest.approx(10_000, rel=0.05)
    assert gap_variation(rows) == pytest.approx(1.0, abs=0.06)
    assert all(0 <= row.arrival_s < 500 for row in rows)


@pytest.mark.parametrize("cv", [0.3, 4.0])
def test_gamma_keeps_the_rate_and_has_the_variation_asked_for(cv: float) -> None:
    rows = rows_of(f"gamma,rate=20,cv={cv},duration=2000")
    assert len(rows) == pytest.approx(40_000, rel=0.1)
    assert gap_variation(rows) == pytest.approx(cv, rel=0.1)


def test_lengths_have_the_median_and_p99_asked_for() -> None:
    rows = rows_of("poisson,rate=50,duration=400,prompt_median=1000,prompt_p99=8000")
    prompts = sorted(row.prompt_tokens for row in rows)
    assert prompts[len(prompts) // 2] == pytest.approx(1000, rel=0.05)
    assert prompts[len(prompts) * 99 // 100] == pytest.approx(8000, rel=0.15)


def test_lengths_by_mean_and_sigma() -> None:
    rows = rows_of("poisson,rate=50,duration=400,output_mean=300,output_sigma=0.5")
    assert statistics.mean(row.output_tokens for row in rows) == pytest.approx(300, rel=0.03)


def test_lengths_are_cut_to_their_limits() -> None:
    rows = rows_of("poisson,rate=20,duration=100,max_prompt=600,max_output=2,output_median=1")
    assert max(row.prompt_tokens for row in rows) == 600
    assert {row.output_tokens for row in rows} == {1, 2}


def test_same_seed_same_rows_and_lengths_do_not_depend_on_arrivals() -> None:
    assert rows_of("poisson,rate=5,duration=60") == rows_of("poisson,rate=5,duration=60")
    first, other = (
        rows_of("poisson,rate=5,duration=60"),
        rows_of("poisson,rate=5,duration=60,seed=1"),
    )
    assert first != other
    bursty = rows_of("gamma,rate=5,duration=60,cv=3")
    both = min(len(first), len(bursty))
    assert [r.prompt_tokens for r in first[:both]] == [r.prompt_tokens for r in bursty[:both]]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("uniform,rate=1,duration=9", "process"),
        ("poisson,duration=9", "rate"),
        ("poisson,rate=0,duration=9", "rate"),
        ("poisson,rate=nan,duration=9", "rate"),
        ("poisson,rate=1,duration=9,rate=2", "rate stands there twice"),
        ("poisson,rate=1,duration=9,speed=2", "speed: unknown"),
        ("poisson,rate=1,duration=9,loud", "'loud' is not name=value"),
        ("poisson,rate=1,duration=9,cv=2", "use 'gamma'"),
        ("poisson,rate=1,duration=9,prompt_mean=5", "prompt_mean and prompt_sigma"),
        ("poisson,rate=1,duration=9,output_median=5,output_p99=4", "output_p99"),
        (
            "poisson,rate=1,duration=9,prompt_median=5,prompt_mean=4,prompt_sigma=1",
            "median and p99",
        ),
        ("poisson,rate=0.001,duration=0.001", "no request"),
    ],
)
def test_wrong_settings_are_named(settings: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows_of(settings)
    assert named in str(caught.value)
