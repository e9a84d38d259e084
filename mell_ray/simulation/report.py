"""A study in words and on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mell_ray.simulation.hardware import GIB
from mell_ray.simulation.study import (
    HOUR_S,
    Run,
    Study,
    best_run,
    billed_over_bound,
    figures,
    reference_run,
    saving,
)


def headline(study: Study) -> str:
    """The study's result in a sentence or two."""
    best = best_run(study)
    own = figures(study, best)
    bound, over = billed_over_bound(study, best)
    text = f"{best.label} bills {format_hours(own['billed_gpu_hours'])} GPU-hours"
    if own["billed_usd"] is not None:
        text += f" ({format_usd(own['billed_usd'])})"
    text += f", {over:.3f} x the lower bound of {format_hours(bound)}."
    others = [run for run in study.runs if run is not best and not run.variant]
    others.sort(key=lambda run: run.result.billed_gpu_seconds)
    parts = []
    for run in others:
        share = f"{100 * saving(best, run):.1f} %"
        parts.append(
            f"as much as {run.label}" if share == "0.0 %" else f"{share} less than {run.label}"
        )
    if parts:
        text += f" That is {', '.join(parts)}."
    frugal = min((best, *others), key=lambda run: run.result.cost(study.migration_price))
    if frugal is not best:
        text += (
            f" With {study.migration_price:.3g} GPU-seconds for each migrated token {frugal.label} "
            f"comes first: J {figures(study, frugal)['cost_j']:.3f} against {own['cost_j']:.3f}."
        )
    if own["delayed_share"] >= 0.01 and own["delay_p99_s"] >= _NOTABLE_WAIT_S:
        text += (
            f" {100 * own['delayed_share']:.0f} % of its requests waited for room, "
            f"p99 {format_wait(own['delay_p99_s'])} of those."
        )
    return text


def format_wait(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"


def format_bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for limit, unit in ((GIB * 1024, "TiB"), (GIB, "GiB"), (1 << 20, "MiB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB" if count else "0"


def format_hours(hours: float) -> str:
    """Four figures or so, with the same number of decimals for like amounts."""
    if 0 < hours < 0.1:
        return f"{hours:.3g}"
    decimals = 1 if hours >= 1000 else 2 if hours >= 10 else 3
    return f"{hours:,.{decimals}f}"


def format_usd(amount: float | None) -> str:
    if amount is None:
        return "-"
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:,.2f}"


def format_duration(seconds: float) -> str:
    if seconds >= 2 * HOUR_S:
        return f"{seconds / HOUR_S:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


_NOTABLE_WAIT_S = 0.5  # shorter waits, such as for a migration that makes room, nobody notices

#: (heading, its meaning) of the policy table, in order; cells come from `policy_cells`.
COLUMNS = (
    ("policy", "Scheduling policy."),
    ("GPU-hours", "GPUs that hold requests, integrated over time."),
    (
        "x bound",
        "GPU-hours over the lower bound: 1 is a perfect packing at every instant. The bound counts "
        "waiting requests too, so where many waited it can be less.",
    ),
    ("billed", "GPU-hours paid for: starting and idle GPUs included."),
    ("cost", "Billed GPU-hours times the price of a GPU."),
    ("peak GPUs", "Most GPUs that held requests at one time."),
    ("migrations", "Requests moved while they ran."),
    ("moved", "KV moved (tokens where the size of a token is not known)."),
    ("per token", "Tokens moved per token of prompt and output."),
    ("J", "(GPU-seconds + migration price x moved tokens) / lower bound."),
    ("preempted", "Requests taken off a GPU and put back in the queue."),
    ("delayed", "Share of the requests that were not placed at once; p99 of their wait."),
)


def policy_cells(study: Study, run: Run) -> list[str]:
    """One row of the policy table, a cell for each of `COLUMNS`."""
    own = figures(study, run)
    moved = own["migrated_bytes"]
    delayed = "0"
    if own["delayed_requests"]:
        share = 100 * own["delayed_share"]
        number = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
        delayed = f"{number} % ({format_wait(own['delay_p99_s'])})"
    return [
        run.label,
        format_hours(own["gpu_hours"]),
        f"{own['ratio']:.3f}",
        format_hours(own["billed_gpu_hours"]),
        format_usd(own["billed_usd"]),
        f"{own['peak_gpus']:,}",
        f"{own['migrations']:,}",
        format_bytes(moved) if moved is not None else f"{own['migrated_tokens']:,}",
        f"{own['recourse']:.3f}",
        f"{own['cost_j']:.3f}",
        f"{own['preemptions']:,}",
        delayed,
    ]


def bound_cells(study: Study) -> list[str]:
    """The last row of the policy table: the lower bound, in the columns where it has a meaning."""
    own = figures(study, reference_run(study))
    cost = None
    if study.gpu_price_per_hour is not None:
        cost = own["lower_bound_gpu_hours"] * study.gpu_price_per_hour
    hours = format_hours(own["lower_bound_gpu_hours"])
    cells = ["lower bound", hours, "1.000", hours, format_usd(cost)]
    return cells + [f"{own['peak_lower_bound_gpus']:,}"] + [""] * (len(COLUMNS) - 6)


#: Columns a narrow terminal does without, the first to go first.
_DISPENSABLE = ("preempted", "J", "per token", "peak GPUs", "delayed", "GPU-hours", "migrations")


def has_column(study: Study, heading: str) -> bool:
    """Money needs a price."""
    return heading != "cost" or study.gpu_price_per_hour is not None


def print_study(study: Study, console: Console) -> None:
    """The trace, what the result rests on, the policy table, the headline and the notes."""
    trace = study.trace
    console.print(
        f"[bold]{escape(trace.name)}[/bold]: {trace.requests:,} requests in "
        f"{format_duration(trace.duration_s)}, prompt p50 {trace.prompt.p50:,} p99 "
        f"{trace.prompt.p99:,}, output p50 {trace.output.p50:,} p99 {trace.output.p99:,} tokens",
        highlight=False,
    )
    if study.assumptions:
        grid = Table.grid(padding=(0, 2))
        for item in study.assumptions:
            grid.add_row(f"  {item.name}", escape(item.value), f"[dim]{escape(item.source)}[/dim]")
        console.print(grid, highlight=False)
    console.print()
    console.print(_fitting_table(study, console))
    console.print()
    console.print(escape(headline(study)), highlight=False)
    for note in study.notes:
        console.print(f"note: {escape(note)}", style="yellow", highlight=False)


def _fitting_table(study: Study, console: Console) -> Table:
    shown = [heading for heading, _ in COLUMNS if has_column(study, heading)]
    unlimited = console.options.update(max_width=1000)
    for heading in _DISPENSABLE:
        if console.measure(_policy_table(study, shown), options=unlimited).maximum <= console.width:
            break
        shown.remove(heading)
    return _policy_table(study, shown)


def _policy_table(study: Study, shown: list[str]) -> Table:
    """The runs side by side, what bills least in bold."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    best = best_run(study)
    places = [number for number, (heading, _) in enumerate(COLUMNS) if heading in shown]

    def add(cells: list[str], style: str | None) -> None:
        table.add_row(*(escape(cells[place]) for place in places), style=style)

    for run in study.runs:
        add(policy_cells(study, run), "bold" if run is best else None)
    add(bound_cells(study), "dim")
    return table
