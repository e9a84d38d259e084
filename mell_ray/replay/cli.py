"""``mell-ray replay``: registration and options. Nothing heavy is imported at the top."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mell_ray.errors import ConfigError
from mell_ray.simulation.cli import TraceArgument, load_trace, output_console, trace_name

if TYPE_CHECKING:
    from mell_ray.replay.run import Watcher
    from mell_ray.replay.session import Finished
    from mell_ray.replay.types import Job, Outcome, ReplayOptions, Slo

KEY_VARIABLE = "OPENAI_API_KEY"
INTERRUPTED = 130  # exit code of what a shell's Ctrl-C ended
_LENGTHS = "Lengths"
_OUTPUT = "Output"


def register(app: typer.Typer) -> None:
    """Add this package's command to the command line."""
    app.command()(replay)


def replay(
    trace: TraceArgument,
    url: Annotated[
        str, typer.Option(help="OpenAI-compatible server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Default: the server's first model.")
    ] = None,
    time_compression: Annotated[
        float, typer.Option(metavar="FACTOR", help="Arrivals come that many times faster.")
    ] = 1.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Only the first S seconds of the trace, as it was recorded."
        ),
    ] = None,
    scale_prompt: Annotated[
        float,
        typer.Option(metavar="FACTOR", help="Prompt tokens, times that.", rich_help_panel=_LENGTHS),
    ] = 1.0,
    scale_output: Annotated[
        float,
        typer.Option(metavar="FACTOR", help="Output tokens, times that.", rich_help_panel=_LENGTHS),
    ] = 1.0,
    max_prompt: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut longer prompts to it.", rich_help_panel=_LENGTHS),
    ] = None,
    max_output: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut longer outputs to it.", rich_help_panel=_LENGTHS),
    ] = None,
    token_ids: Annotated[
        str,
        typer.Option(
            metavar="LOW:HIGH",
            help="Prompts are made of these token ids, HIGH excluded; they must be in the model's "
            "vocabulary.",
            rich_help_panel=_LENGTHS,
        ),
    ] = "256:4096",
    slo_ttft_ms: Annotated[
        float, typer.Option(metavar="MS", min=0, help="Goodput counts answers within it.")
    ] = 2000.0,
    slo_tpot_ms: Annotated[
        float, typer.Option(metavar="MS", min=0, help="Goodput counts answers within it.")
    ] = 100.0,
    timeout_s: Annotated[
        float,
        typer.Option(metavar="S", min=0.001, help="A request not fully answered by then failed."),
    ] = 600.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts' tokens.")] = 0,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all figures here; '-' is stdout.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    html_out: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report with charts, one file.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Send the requests of a trace to a live server at the trace's times, and measure the answers.

    Open loop: a request leaves when its time has come, whatever became of those before. Prompts
    are random tokens of the right number, shared where the trace's prefix hashes are; answers have
    the trace's length. Exit code 1 if a request failed. The key in OPENAI_API_KEY is sent. Ctrl-C
    ends it early and reports what had ended by then, with exit code 130.
    """
    from mell_ray.replay.measure import as_json
    from mell_ray.replay.plan import plan
    from mell_ray.replay.report import print_summary
    from mell_ray.replay.types import ReplayOptions, Slo
    from mell_ray.simulation.eventlog import check_outputs

    check_outputs(json_out, html_out)
    options = ReplayOptions(
        time_compression=time_compression,
        seconds=seconds,
        scale_prompt=scale_prompt,
        scale_output=scale_output,
        max_prompt=max_prompt,
        max_output=max_output,
        token_ids=_parse_range(token_ids),
        seed=seed,
    )
    slo = Slo(slo_ttft_ms, slo_tpot_ms)
    jobs = plan(load_trace(trace), options)
    done = _run(jobs, url, model, options, slo, timeout_s)
    title = f"{trace_name(trace)} on {done.model}"
    settings = {"url": url, "model": done.model, "timeout_s": timeout_s, **asdict(options)}
    if json_out:
        about = {"trace": trace_name(trace), "settings": settings}
        _write(json_out, json.dumps(as_json(done.summary, about), indent=1, allow_nan=False) + "\n")
    if html_out:
        from mell_ray.replay.html import render_html

        _write(str(html_out), render_html(title, done.summary, done.outcomes, settings))
    print_summary(done.summary, title, output_console(stderr=json_out == "-"))
    if done.summary.left_out:
        raise typer.Exit(INTERRUPTED)
    if done.summary.failed:
        typer.echo(
            f"error: {done.summary.failed:,} of {done.summary.requests:,} requests failed", err=True
        )
        raise typer.Exit(1)


def _run(
    jobs: list[Job],
    url: str,
    model: str | None,
    options: ReplayOptions,
    slo: Slo,
    timeout_s: float,
) -> Finished:
    try:
        from mell_ray.replay.client import Endpoint
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise ConfigError("replay needs the package httpx: pip install 'mell-ray[load]'") from None
    from mell_ray.replay.session import replay as run_replay

    async def main() -> Finished:
        key = os.environ.get(KEY_VARIABLE)
        async with Endpoint(url, key=key, timeout_s=timeout_s) as endpoint:
            with _progress(len(jobs)) as watcher:
                return await run_replay(
                    jobs,
                    endpoint,
                    options,
                    model=model,
                    slo=slo,
                    watcher=watcher,
                    warn=lambda text: typer.echo(f"warning: {text}", err=True),
                    stoppable=_on_interrupt,
                )

    return asyncio.run(main())


def _on_interrupt(stop: Callable[[], None]) -> None:
    """The first Ctrl-C (or SIGTERM) ends the replay, the next one the process."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupted() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        stop()

    for number in signals:
        loop.add_signal_handler(number, interrupted)


@contextmanager
def _progress(total: int) -> Iterator[Watcher]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("0 running", total=total)
        running = failed = 0

        def show(ended: int) -> None:
            text = f"{running:,} running" + (f", {failed:,} failed" if failed else "")
            bars.update(task, advance=ended, description=text)

        class Bar:
            def sent(self) -> None:
                nonlocal running
                running += 1
                show(0)

            def ended(self, outcome: Outcome) -> None:
                nonlocal running, failed
                running -= 1
                failed += outcome.failure is not None
                show(1)

        yield Bar()


def _parse_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError(f"--token-ids {text!r} is not LOW:HIGH, for example 256:4096") from None


def _write(path: str, text: str) -> None:
    from mell_ray.simulation.eventlog import open_output

    if path == "-":
        sys.stdout.write(text)
        return
    with open_output(path) as stream:
        stream.write(text)
