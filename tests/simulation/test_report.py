from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from mell_ray.simulation import plots
from mell_ray.simulation.html import draw, render_html
from mell_ray.simulation.report import (
    bound_cells,
    format_bytes,
    headline,
    policy_cells,
    print_study,
)
from mell_ray.simulation.study import (
    Assumption,
    Lengths,
    Run,
    Study,
    TraceSummary,
    as_json,
    figures,
    percentile,
    reference_run,
    summarise,
)
from mell_ray.simulation.types import SimOptions, SimResult, Timeline, TraceRow

TRACE = TraceSummary("t", 100, 3600.0, 0.03, 0.1, Lengths(1, 2, 3, 4), Lengths(1, 2, 3, 4))


def result(
    policy: str, gpu_seconds: float, migrated: int, *, samples: int = 50, bound: int = 10
) -> SimResult:
    gpus = round(gpu_seconds / 3600)
    return SimResult(
        options=SimOptions(gpu_tokens=1000, policy=policy),
        requests=100,
        finished=100,
        total_tokens=1_000_000,
        duration_s=3600.0,
        gpu_seconds=gpu_seconds,
        billed_gpu_seconds=1.5 * gpu_seconds,
        lower_bound_gpu_seconds=bound * 3600.0,
        migrations=migrated // 1000,
        migrated_tokens=migrated,
        peak_gpus=gpus + 1,
        peak_lower_bound=bound,
        timeline=Timeline(
            t=[3600.0 * n / samples for n in range(samples)],
            gpus=[gpus] * samples,
            lower_bound=[bound] * samples,
            used_tokens=[9000] * samples,
            migrated_tokens=[0] * samples,
            queued=[0] * samples,
        ),
    )


def study(**fields: object) -> Study:
    made = Study(
        title="llama on h100",
        trace=TRACE,
        runs=[
            Run("tide", result("tide", 11 * 3600, 200_000), 1.0),
            Run("worst-fit", result("worst-fit", 22 * 3600, 0), 1.0),
        ],
        migration_price=1e-2,
        gpus_per_replica=2,
        kv_bytes_per_token=1024.0,
        gpu_price_per_hour=3.0,
        assumptions=[Assumption("GPU price an hour", "$3.00", "assumption")],
        notes=["a note"],
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def test_figures_are_in_gpus_bytes_and_dollars() -> None:
    made = study()
    own = figures(made, made.runs[0])
    assert own["gpu_hours"] == pytest.approx(22)  # 11 replicas of 2 GPUs for an hour
    assert own["billed_gpu_hours"] == pytest.approx(33)
    assert own["billed_usd"] == pytest.approx(99)
    assert own["usd_per_million_tokens"] == pytest.approx(99)
    assert own["lower_bound_gpu_hours"] == pytest.approx(20)
    assert own["ratio"] == pytest.approx(1.1)
    assert (own["mean_gpus"], own["peak_gpus"]) == (pytest.approx(22), 24)
    assert own["migrated_bytes"] == 200_000 * 1024
    assert own["recourse"] == pytest.approx(0.2)
    assert own["cost_j"] == pytest.approx((11 * 3600 + 1e-2 * 200_000) / 36000)


def test_money_and_bytes_are_left_out_where_they_are_not_known() -> None:
    made = study(kv_bytes_per_token=None, gpu_price_per_hour=None)
    own = figures(made, made.runs[0])
    assert own["billed_usd"] is None
    assert own["migrated_bytes"] is None
    assert "$" not in headline(made)


def test_all_policies_are_priced_alike_in_j() -> None:
    """A variant ran at a price of its own; its J must still compare with the others'."""
    made = study()
    swept = dataclasses.replace(
        made.runs[0].result,
        options=SimOptions(gpu_tokens=1000, policy="tide", migration_price=5.0),
    )
    made.runs.append(Run("tide @ 5", swept, 1.0, variant=True))
    assert figures(made, made.runs[2])["cost_j"] == figures(made, made.runs[0])["cost_j"]


def test_the_headline_names_the_cheapest_policy_and_what_it_saves() -> None:
    made = study()
    made.runs.reverse()
    assert headline(made).startswith("tide bills 33.00 GPU-hours ($99.00), 1.650 x the lower bound")
    assert "50.0 % less than worst-fit" in headline(made)
    made.runs.append(Run("tide @ 0", result("tide", 10 * 3600, 900_000), 1.0, variant=True))
    assert headline(made).startswith("tide bills 33.00 ")
    made.runs.append(Run("mell", result("mell", 11 * 3600, 300_000), 1.0))
    assert "That is as much as mell, 50.0 % less than worst-fit." in headline(made)


def test_json_has_every_figure_and_series_and_no_nan() -> None:
    made = study()
    text = json.dumps(as_json(made), allow_nan=False)
    run = json.loads(text)["runs"][0]
    assert run["options"]["policy"] == "tide"
    assert len(run["timeline"]["t"]) == len(run["timeline"]["gpus"]) == 50
    assert set(figures(made, made.runs[0])) <= set(run)


@pytest.mark.parametrize("width", [72, 100, 200])
def test_the_table_fits_the_terminal_without_cutting_a_figure(width: int) -> None:
    stream = io.StringIO()
    print_study(study(), Console(file=stream, width=width))
    text = stream.getvalue()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for needed in ("worst-fit", "lower bound", "$198", "1.100", "note: a note"):
        assert needed in text
    assert ("preempted" in text) == (width == 200)


def test_names_from_outside_are_text_not_markup() -> None:
    hostile = "[bold]<script>alert(1)</script>[/bold]"
    made = study(title=hostile, notes=[hostile])
    stream = io.StringIO()
    print_study(made, Console(file=stream, width=200))
    assert f"note: {hostile}" in stream.getvalue()
    over_time, pareto = draw(made)
    page = render_html(made, over_time=over_time, pareto=pareto, command=hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_report_is_one_file_for_light_and_dark() -> None:
    made = study()
    over_time, pareto = draw(made)
    page = render_html(made, over_time=over_time, pareto=pareto, command="mell-ray plan t.csv")
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert page.count("prefers-color-scheme: dark") == 3
    for needed in ("llama on h100", "tide", "worst-fit", "lower bound", "$99.00", "a note"):
        assert needed in page


def png_size(image: bytes) -> tuple[int, int]:
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")


def single(samples: int, migrated: int, seconds: float) -> Study:
    run = Run("tide", result("tide", seconds, migrated, samples=samples), 1.0)
    return study(runs=[run], kv_bytes_per_token=None)


@pytest.mark.parametrize(
    "made",
    [study(), single(1, 0, 36000.0), single(4000, 5, 30000.0)],
    ids=["two", "no-migration", "short-of-the-bound"],
)
def test_pictures_are_drawn_the_same_each_time(made: Study) -> None:
    for draw_one in (plots.gpus_over_time, plots.pareto):
        image = draw_one(made)
        assert png_size(image)[0] == 1650
        assert draw_one(made) == image
        assert draw_one(made, plots.DARK) != image


def test_a_trace_is_summarised() -> None:
    rows = [TraceRow(n, float(n), n + 1, 10) for n in range(200)]
    summary = summarise("t", rows)
    assert summary.prompt == Lengths(100, 180, 198, 200)
    assert summary.output == Lengths(10, 10, 10, 10)
    assert summary.requests_per_s == pytest.approx(200 / 199)
    assert summary.peak_requests_per_s == pytest.approx(1.0)
    assert percentile([5], 0.001) == 5
    assert summarise("t", rows[:1]).requests == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (512, "0.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB"), (3 << 41, "6.0 TiB")],
)
def test_bytes_are_written_in_a_readable_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_waiting_is_told_and_the_bound_is_that_of_the_run_that_waited_least() -> None:
    made = study()
    made.runs[0].result.delayed_requests = 20
    made.runs[0].result.delay_p99_s = 30.0
    made.runs[0].result.demand_short_share = 0.1
    made.runs[0].result.lower_bound_gpu_seconds *= 1.1
    assert reference_run(made) is made.runs[1]
    assert "20 % of its requests waited for room, p99 30.0 s of those." in headline(made)
    assert policy_cells(made, made.runs[0])[-1] == "20 % (30.0 s)"
    assert bound_cells(made)[:2] == ["lower bound", "20.00"]
    made.runs[0].result.delay_p99_s = 0.04
    assert "waited" not in headline(made)
    assert policy_cells(made, made.runs[0])[-1] == "20 % (40 ms)"


def test_a_policy_that_bills_least_by_moving_much_is_told_from_the_frugal_one() -> None:
    made = study()
    made.runs.append(Run("mell", result("mell", 11 * 3600 - 60, 900_000), 1.0))
    assert headline(made).startswith("mell bills ")
    assert "for each migrated token tide comes first: J 1.156 against 1.348." in headline(made)
    assert "comes first" not in headline(study())
