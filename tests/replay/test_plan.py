from __future__ import annotations

import pytest

from mell_ray.errors import ConfigError
from mell_ray.replay.plan import plan, too_long
from mell_ray.replay.types import ReplayOptions
from mell_ray.simulation.types import TraceRow

ROWS = [TraceRow(0, 10.0, 100, 40), TraceRow(1, 12.0, 1000, 3), TraceRow(2, 20.0, 10, 10)]


def test_first_request_leaves_at_once_and_gaps_are_compressed() -> None:
    jobs = plan(ROWS, ReplayOptions(time_compression=4.0))
    assert [job.at_s for job in jobs] == [0.0, 0.5, 2.5]
    assert [job.number for job in jobs] == [0, 1, 2]


def test_seconds_are_those_of_the_recorded_trace() -> None:
    jobs = plan(ROWS, ReplayOptions(time_compression=4.0, seconds=10.0))
    assert [job.number for job in jobs] == [0, 1]


def test_lengths_are_scaled_then_cut_and_never_zero() -> None:
    options = ReplayOptions(scale_prompt=0.5, max_prompt=200, scale_output=0.1, max_output=3)
    jobs = plan(ROWS, options)
    assert [(job.prompt_tokens, job.output_tokens) for job in jobs] == [(50, 3), (200, 1), (5, 1)]
    assert {job.prefix_block for job in jobs} == {256}


def test_counts_what_no_context_can_hold() -> None:
    jobs = plan(ROWS, ReplayOptions())
    assert too_long(jobs, 140) == 1
    assert too_long(jobs, 139) == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"time_compression": 0.0}, "time_compression"),
        ({"scale_output": -1.0}, "scale_output"),
        ({"seconds": 0.0}, "seconds"),
        ({"max_prompt": 0}, "max_prompt"),
        ({"token_ids": (5, 5)}, "token_ids"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ReplayOptions(**settings)  # type: ignore[arg-type]
