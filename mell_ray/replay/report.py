"""A replay for people: rows of text that the terminal and the HTML page share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mell_ray.replay.measure import LATE_S, is_late
from mell_ray.replay.types import Spread, Summary

if TYPE_CHECKING:
    from rich.console import Console

SPREAD_COLUMNS = ("p50", "p90", "p99", "mean", "max")


def latency_rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """(what, its percentiles) in milliseconds, in the order of ``SPREAD_COLUMNS``."""
    spreads = (
        ("Time to first token (TTFT)", summary.ttft_ms),
        ("Time per output token (TPOT)", summary.tpot_ms),
        ("Between tokens (ITL)", summary.itl_ms),
        ("Whole request", summary.e2e_ms),
        ("Late start of this client", summary.late_ms),
    )
    return [(label, _cells(spread)) for label, spread in spreads]


def figures(summary: Summary) -> list[tuple[str, str]]:
    """(value, what it is), the important ones first."""
    slo = summary.slo
    return [
        (f"{summary.ok:,} / {summary.requests:,}", "requests answered"),
        (
            f"{summary.goodput_per_s:,.2f} /s",
            f"goodput: TTFT ≤ {slo.ttft_ms:g} ms and TPOT ≤ {slo.tpot_ms:g} ms, kept by "
            f"{summary.good / summary.requests:.1%}",
        ),
        (f"{summary.requests_per_s:,.2f} /s", "requests answered per second"),
        (f"{summary.output_tokens_per_s:,.0f} /s", "output tokens per second"),
        (f"{summary.peak_running:,}", "requests running at most"),
        (f"{summary.duration_s:,.1f} s", "first arrival to last answer"),
    ]


def notes(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if summary.failed:
        found.append(
            f"{summary.failed:,} requests failed; latencies are those of the other {summary.ok:,}"
        )
    if summary.left_out:
        found.append(
            f"interrupted: {summary.left_out:,} requests of the trace were not sent, or had not "
            "ended, and count nowhere"
        )
    if summary.uncounted:
        found.append(
            f"the server told no token counts (usage) for {summary.uncounted:,} answers: there "
            "each event counts as one token, and the lengths of answers are not checked"
        )
    if is_late(summary):
        found.append(
            f"this client sent {summary.late_starts:,} requests more than {LATE_S * 1e3:g} ms "
            "late: it is too slow for this load, so the load was lighter than asked for and the "
            "latencies include its own delays"
        )
    return found


def print_summary(summary: Summary, title: str, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("milliseconds")
    for name in SPREAD_COLUMNS:
        table.add_column(name, justify="right")
    for label, cells in latency_rows(summary):
        table.add_row(label, *cells)
    console.print(table)
    for value, what in figures(summary):
        console.print(Text(f"{value:>14}  {what}"))
    if summary.errors:
        errors = Table(title="errors", title_justify="left")
        errors.add_column("count", justify="right")
        errors.add_column("kind (# stands for a number)")
        for error in summary.errors:
            errors.add_row(f"{error.count:,}", Text(error.kind))
        console.print(errors)
    for note in notes(summary):
        console.print(Text(f"note: {note}"))


def _cells(spread: Spread) -> list[str]:
    values = (spread.p50, spread.p90, spread.p99, spread.mean, spread.max)
    return ["–" if value is None else f"{value:,.1f}" for value in values]
