"""``mell-ray simulate``, ``plan`` and ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mell_ray.simulation.types import TraceRow

_TRACE_HELP = (
    "Trace: a .csv or .csv.gz with columns arrival_s, prompt_tokens, output_tokens and optionally "
    "session_id, prefix_hashes; or a generated one such as "
    "'synthetic:gamma,rate=2,cv=3,duration=600,prompt_median=500,prompt_p99=4000'."
)
TraceArgument = Annotated[str, typer.Argument(metavar="TRACE", help=_TRACE_HELP)]


def load_trace(source: str) -> list[TraceRow]:
    """The rows of a trace file or of a ``synthetic:`` specification."""
    from mell_ray.simulation import synthetic
    from mell_ray.simulation.trace import read_trace

    if source.startswith(synthetic.PREFIX):
        return synthetic.generate(synthetic.parse_spec(source))
    return read_trace(source)


def audit(
    trace: TraceArgument,
    log: Annotated[Path, typer.Argument(help="Event log that 'simulate --events' wrote.")],
) -> None:
    """Check an event log against its trace: capacity, completeness, one GPU per request, time."""
    from mell_ray.simulation.audit import audit as run_audit
    from mell_ray.simulation.eventlog import read_events

    report = run_audit(load_trace(trace), read_events(log))
    typer.echo(
        f"{report.lines} events, {report.finished} requests finished, "
        f"{report.too_large} larger than any GPU, {report.migrations} migrations, "
        f"{report.preemptions} preemptions, at most {report.peak_gpus} GPUs at once"
    )
    if report.ok:
        typer.echo("ok: no rule is broken")
        return
    for violation in report.violations:
        typer.echo(f"{log}, {violation}", err=True)
    typer.echo(f"error: {report.num_violations} rules broken", err=True)
    raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command()(audit)
