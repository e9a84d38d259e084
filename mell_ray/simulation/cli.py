"""``mell-ray simulate``, ``plan`` and ``audit``: registration, and what they share.

Nothing heavy is imported at the top: these modules are read for ``mell-ray --help``.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mell_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from mell_ray.simulation.study import Run, Study
    from mell_ray.simulation.types import EventSink, SimOptions, SimResult, TraceRow

_TRACE_HELP = (
    "A .csv or .csv.gz with columns arrival_s (seconds, or dates), prompt_tokens, output_tokens "
    "and optionally session_id, prefix_hashes. Or a file as Azure, BurstGPT or Mooncake publish "
    "theirs. Or a generated one: 'synthetic:poisson,rate=2,duration=600', "
    "'synthetic:gamma,cv=3,...' for bursts; settings prompt_median, prompt_p99, output_median, "
    "output_p99 (or ..._mean and ..._sigma), max_prompt, max_output, seed."
)
TraceArgument = Annotated[str, typer.Argument(metavar="TRACE", help=_TRACE_HELP)]

_FLEET = "The fleet"
_LOAD = "The load"

#: Options that `simulate` and `plan` share.
StartupOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Seconds from asking for a GPU until it serves; billed.",
        rich_help_panel=_FLEET,
    ),
]
GraceOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Seconds an empty GPU is kept. Default: the start-up time, or none with a forecast.",
        rich_help_panel=_FLEET,
    ),
]
SpareOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="Empty GPUs kept ready.", rich_help_panel=_FLEET)
]
MaxGpusOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Beyond it requests queue. Default: no limit.",
        rich_help_panel=_FLEET,
    ),
]
MaxRequestsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Running on a GPU at once. Default: no limit.",
        rich_help_panel=_FLEET,
    ),
]
EpochOption = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens a request decodes between planning ticks.",
        rich_help_panel=_FLEET,
    ),
]
ReportOption = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens a request decodes between reports of its growth; a GPU keeps that much free "
        "for each. At most an epoch.",
        rich_help_panel=_FLEET,
    ),
]
ForecastOption = Annotated[
    bool | None,
    typer.Option(
        "--forecast/--no-forecast",
        help="Open and keep GPUs as the scheduler forecasts demand. Default: where GPUs take time "
        "to start.",
        rich_help_panel=_FLEET,
    ),
]
InitialOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="GPUs ready at time 0.", rich_help_panel=_FLEET)
]
NodeOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="GPUs of a machine, which is paid for until all of them are given back.",
        rich_help_panel=_FLEET,
    ),
]
MeasureFromOption = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=0.99,
        help="Leave that first part of the trace out of the sums: the fleet starts from nothing.",
        rich_help_panel=_LOAD,
    ),
]
DrainOption = Annotated[
    bool,
    typer.Option(
        "--drain/--no-drain",
        help="Count what happens after the last arrival, while the fleet runs empty.",
        rich_help_panel=_LOAD,
    ),
]
SpreadOption = Annotated[
    bool,
    typer.Option(
        "--spread-ties",
        help="The trace's clock is coarse: spread arrivals at random up to its next reading.",
        rich_help_panel=_LOAD,
    ),
]
CompressionOption = Annotated[
    float,
    typer.Option(
        metavar="FACTOR",
        min=0.001,
        help="Arrivals come that many times faster.",
        rich_help_panel=_LOAD,
    ),
]
CopiesOption = Annotated[
    float,
    typer.Option(
        metavar="FACTOR",
        min=0.001,
        help="Copies of the trace on top of each other, each shifted in time; < 1 thins it.",
        rich_help_panel=_LOAD,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(metavar="N", help="Of the copies' shifts and of thinning.", rich_help_panel=_LOAD),
]


def fleet_defaults(
    startup_s: float, forecast: bool | None, idle_grace_s: float | None
) -> tuple[bool, float]:
    """(forecast, idle grace) where they are not given."""
    foresee = startup_s > 0 if forecast is None else forecast
    if idle_grace_s is None:
        idle_grace_s = 0.0 if foresee else startup_s
    return foresee, idle_grace_s


def load_trace(source: str, *, spread_seed: int | None = None) -> list[TraceRow]:
    """The rows of a trace file or of a ``synthetic:`` specification. Dates are counted from the
    first one.

    With ``spread_seed``, equal arrivals are spread (see ``transform.spread_ties``).
    """
    from mell_ray.simulation import synthetic
    from mell_ray.simulation.trace import from_first, read_trace

    if source.startswith(synthetic.PREFIX):
        rows = synthetic.generate(synthetic.parse_spec(source))
    else:
        rows = from_first(read_trace(source, lambda text: typer.echo(f"note: {text}", err=True)))
    if spread_seed is None:
        return rows
    from mell_ray.simulation.transform import spread_ties

    return spread_ties(rows, random.Random(spread_seed))


def trace_name(source: str) -> str:
    """What reports call the trace: a file's name without its endings, a specification as it is."""
    from mell_ray.simulation import synthetic

    if source.startswith(synthetic.PREFIX):
        return source
    return Path(source).name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")


def parse_params(settings: Sequence[str]) -> dict[str, Any]:
    """``name=value`` settings of a policy; values are JSON where they can be, else text.

    Raises:
        ConfigError: not of that form, or given twice.
    """
    params: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--param {setting!r} is not name=value")
        if name in params:
            raise ConfigError(f"--param {name} is given twice")
        try:
            params[name] = json.loads(value)
        except json.JSONDecodeError:
            params[name] = value
    return params


def run_policy(
    rows: Sequence[TraceRow],
    options: SimOptions,
    *,
    label: str,
    variant: bool = False,
    sink: EventSink | None = None,
    progress: Callable[[float], None] | None = None,
) -> Run:
    """One simulation, timed.

    Raises:
        ConfigError: no request is left to simulate.
    """
    from mell_ray.simulation.loop import simulate
    from mell_ray.simulation.study import Run

    start = time.perf_counter()
    result = simulate(rows, options, sink=sink, progress=progress)
    if not result.requests:
        raise ConfigError(_why_nothing(rows, result))
    return Run(label, result, time.perf_counter() - start, variant)


def _why_nothing(rows: Sequence[TraceRow], result: SimResult) -> str:
    if result.dropped < len(rows):
        return f"--copies {result.options.copies:g} leaves none of {len(rows):,} requests"
    least = min(row.prompt_tokens + row.output_tokens for row in rows)
    return (
        f"all {len(rows):,} requests are larger than the {result.options.gpu_tokens:,} KV tokens "
        f"of a GPU (--gpu-tokens); the smallest takes {least:,}"
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Callable[[float], None]]]:
    """A bar per run on stderr; silent where that is not a terminal.

    Yields a function from a run's label to that run's callback, which takes the share done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>14}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def start(label: str) -> Callable[[float], None]:
            task = bars.add_task(label, total=1.0)
            return lambda done: bars.update(task, completed=done)

        yield start


def output_console(*, stderr: bool = False) -> Console:
    """The terminal, or 160 columns where the output goes into a file or a pipe."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def write_json(study: Study, path: str) -> None:
    """Every figure of the study; ``-`` is stdout."""
    from mell_ray.simulation.eventlog import open_output
    from mell_ray.simulation.study import as_json

    text = json.dumps(as_json(study), indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    with open_output(path) as stream:
        stream.write(text)


def workload_notes(study: Study) -> list[str]:
    """What a reader must know of requests that were not served as asked."""
    notes = []
    first = study.runs[0].result
    if first.dropped:
        notes.append(
            f"larger than the {first.options.gpu_tokens:,} KV tokens of a GPU and left out: "
            f"{first.dropped:,} of {first.dropped + first.requests:,} requests"
        )
    if first.peak_lower_bound <= 2:
        gpus = first.peak_lower_bound * study.gpus_per_replica
        notes.append(
            f"the load never needs more than {gpus} GPU{'s' * (gpus != 1)}, so policies can hardly "
            "differ; --copies N asks what N times the load would take"
        )
    for run in study.runs:
        if run.result.rejected:
            notes.append(f"rejected by {run.label}: {run.result.rejected:,} requests")
    return notes


def audit(
    trace: TraceArgument,
    log: Annotated[Path, typer.Argument(help="Event log that 'simulate --events' wrote.")],
) -> None:
    """Check an event log against its trace: capacity, completeness, one GPU per request, time.

    Needs nothing but the two files: it counts everything again. Exit code 1 where a rule is
    broken. A run with --copies, --time-compression or --spread-ties is checked against the trace
    that 'simulate --save-trace' wrote.
    """
    from mell_ray.simulation.audit import audit as run_audit
    from mell_ray.simulation.eventlog import read_events

    report = run_audit(load_trace(trace), read_events(log))
    typer.echo(
        f"{report.lines:,} events: {report.finished:,} requests finished, {report.too_large:,} "
        f"larger than any GPU, {report.migrations:,} migrations of {report.migrated_tokens:,} "
        f"tokens, {report.preemptions:,} preemptions, {report.peak_gpus:,} GPUs at most"
    )
    if report.ok:
        typer.echo("ok: no rule is broken")
        return
    for violation in report.violations:
        typer.echo(f"{log}, {violation}", err=True)
    typer.echo(f"error: rules are broken in {report.num_violations:,} places", err=True)
    raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    from mell_ray.simulation.cli_plan import plan
    from mell_ray.simulation.cli_simulate import simulate

    app.command()(plan)
    app.command()(simulate)
    app.command()(audit)
