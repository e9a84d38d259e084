"""``mell-ray bench``: registration and options. Nothing heavy is imported at the top."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mell_ray.errors import ConfigError

if TYPE_CHECKING:
    from mell_ray.bench.workload import BenchRequest


class Dtype(StrEnum):
    """What the weights of the benchmarks' random model can be."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


app = typer.Typer(
    no_args_is_help=True, help="Measure what this machine does with a model.", name="bench"
)


def register(root: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    root.add_typer(app)


@app.command()
def throughput(
    model: Annotated[
        str,
        typer.Option(metavar="ID_OR_PATH", help="Hugging Face id, a directory, or 'builtin'."),
    ],
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to run.")] = 64,
    input_len: Annotated[
        str, typer.Option(metavar="N|LOW:HIGH", help="Prompt tokens of a request.")
    ] = "128",
    output_len: Annotated[
        str, typer.Option(metavar="N|LOW:HIGH", help="Output tokens of a request.")
    ] = "64:128",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; 'auto': bfloat16 where this CPU computes it in "
            "hardware (AMX, AVX512-BF16), else float32."
        ),
    ] = "auto",
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Token budget of one step.")
    ] = 512,
    seed: Annotated[int, typer.Option(help="Of the random prompts and lengths.")] = 0,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Run these instead of random ones: a JSON list of objects with prompt_token_ids "
            "and output_len.",
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")
    ] = None,
) -> None:
    """Output tokens per second, TTFT and ITL of one engine under a fixed number of requests.

    The engine runs in this process on the CPU, without Ray and HTTP; sampling is greedy and end
    tokens are ignored. `cold_start_s` is the time from the start of the process to a first token.
    """
    from mell_ray.bench.throughput import ThroughputOptions, measure
    from mell_ray.bench.workload import LengthRange, load_requests, random_requests

    _check_output(json_out)
    inputs = LengthRange.parse(input_len, "--input-len")
    outputs = LengthRange.parse(output_len, "--output-len")
    given = None if requests is None else load_requests(requests)

    def make(vocab_size: int) -> list[BenchRequest]:
        if given is not None:
            return given
        return random_requests(num_prompts, inputs, outputs, vocab_size, seed)

    options = ThroughputOptions(
        model=model,
        concurrency=concurrency,
        threads=threads,
        dtype=dtype,
        max_num_batched_tokens=max_num_batched_tokens,
        seed=seed,
    )
    with _progress() as on_phase:
        result = measure(options, make, on_phase)
    _print(result)
    _write(result, json_out)


@app.command()
def migration(
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A tenth of the work: to see that it runs, not for figures.")
    ] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this part; repeatable: transport, kv, token, hybrid, others, choice."
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; float32 is what CPU replicas use by default.")
    ] = Dtype.FLOAT32,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
) -> None:
    """What live migration costs: stalls, other requests, transport, choice of a mode.

    Starts Ray and two CPU replicas of a random model of 50 million parameters on this machine;
    takes about ten minutes. Run it on an otherwise idle machine.
    """
    from mell_ray.bench.migration import PARTS, MigrationBenchOptions, measure

    _check_output(json_out)
    parts = tuple(part or PARTS)
    for name in parts:
        if name not in PARTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(PARTS)}", param_hint="--part")
    options = MigrationBenchOptions(parts, dtype=dtype.value, seed=seed)
    if quick:
        options = MigrationBenchOptions(
            parts,
            kv_moves=6,
            token_moves=4,
            windows=1,
            window_s=2.0,
            transfers=2,
            grid_contexts=(256,),
            grid_bytes_per_s=(2e6, 1e9),
            grid_loads=(0,),
            dtype=dtype.value,
            seed=seed,
        )
    result = measure(options, _print_phase)
    _print_figures(result)
    _write(result, json_out)


@app.command()
def serving(
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams that run at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Length of the measurement.")] = 20.0,
    haproxy: Annotated[bool, typer.Option(help="Ray Serve's HAProxy mode, as in `serve`.")] = True,
) -> None:
    """What a token and a first token cost besides the model, from HTTP to the engine.

    Starts Ray, Serve and one replica on this machine; its engine is the real one without a model.
    `cpu_us_per_token` sums proxy, ingress, Router, Migrator and replica without the engine's own
    steps. Run it on an otherwise idle machine.
    """
    from mell_ray.bench.serving import ServingBenchOptions, measure

    _check_output(json_out)
    options = ServingBenchOptions(streams=streams, seconds=seconds, haproxy=haproxy)
    result = measure(options, _print_phase)
    typer.echo(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=2))
    _write(result, json_out)


@app.command()
def sleep(
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Cold starts.")] = 3,
    naps: Annotated[int, typer.Option(min=1, help="Sleeps after each.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.BFLOAT16,
) -> None:
    """How long a sleeping replica takes to wake, next to a cold start, both to a first token.

    Starts Ray and CPU replicas of a random model of 50 million parameters on this machine; takes
    about a minute. Run it on an otherwise idle machine.
    """
    from mell_ray.bench.sleep import SleepBenchOptions, measure

    _check_output(json_out)
    options = SleepBenchOptions(dtype=dtype.value, rounds=rounds, naps=naps)
    result = measure(options, _print_phase)
    _print_figures(result)
    _write(result, json_out)


def _print_phase(phase: str) -> None:
    typer.echo(phase, err=True)


def _print_figures(result: dict[str, Any]) -> None:
    """The figures that stand for the whole, a line each."""
    for key, value in result.items():
        if isinstance(value, float | int):
            typer.echo(f"{key:26} {value:8.3f}")


def _check_output(json_out: Path | None) -> None:
    """Before a run of minutes: whether its result can be written."""
    if json_out is None:
        return
    known = json_out.exists()
    try:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.open("ab").close()
        if not known:
            json_out.unlink()
    except OSError as error:
        raise ConfigError(f"--json: cannot write {json_out}: {error.strerror}") from None


def _write(result: dict[str, Any], json_out: Path | None) -> None:
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("")

        def on_phase(name: str, num_tokens: int) -> Callable[[int], None]:
            bars.reset(task, description=name, total=num_tokens or None)
            return lambda tokens: bars.advance(task, tokens)

        yield on_phase


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    table = Table(
        title=f"{result['num_requests']} requests, {settings['concurrency']} at once, "
        f"{settings['threads']} threads, {settings['dtype']}, {settings['kernels']} kernels",
        title_justify="left",
    )
    for name in ("", "p50", "p99", "mean"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in (
        ("ttft_ms", "Time to first token, ms"),
        ("itl_ms", "Inter-token latency, ms"),
        ("e2e_ms", "Whole request, ms"),
    ):
        cells = [result[key][name] for name in ("p50", "p99", "mean")]
        table.add_row(label, *("–" if cell is None else f"{cell:,.1f}" for cell in cells))
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(
        f"{result['output_tokens_per_s']:,.1f} output tokens/s "
        f"({result['output_tokens']:,} in {result['duration_s']:.2f} s); "
        f"cold start to first token {result['cold_start_s']:.1f} s"
    )
