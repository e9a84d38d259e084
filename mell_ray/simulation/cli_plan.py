"""``mell-ray plan``: what a trace of one's own would take on real GPUs, policy by policy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mell_ray.errors import ConfigError
from mell_ray.simulation import cli

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mell_ray.simulation.hardware import Gpu
    from mell_ray.simulation.modelspec import ModelSpec
    from mell_ray.simulation.sizing import ReplicaSize, SizingOverrides
    from mell_ray.simulation.study import Assumption, Study
    from mell_ray.simulation.types import SimOptions, TraceRow

_MODEL = "The model"
_GPU = "The GPU"
_REPLICA = "The replica: estimates that you may know better"


def plan(
    trace: cli.TraceArgument,
    model: Annotated[
        str,
        typer.Option(
            metavar="ID_OR_PATH",
            help="Hugging Face id, a directory, or a config.json.",
            rich_help_panel=_MODEL,
        ),
    ],
    gpu: Annotated[
        str,
        typer.Option(
            help="GPU of the built-in table, such as h100-80g, a100-80g, l4-24g.",
            rich_help_panel=_GPU,
        ),
    ] = "h100-80g",
    policies: Annotated[
        str,
        typer.Option(metavar="P1,P2,...", help="Policies to compare. Default: all, 'tide' first."),
    ] = "",
    sweep_prices: Annotated[
        str,
        typer.Option(
            metavar="P1,P2,...",
            help="Also run the first policy at these migration prices: its whole frontier.",
        ),
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Directory for report.html, plan.json and the pictures.")
    ] = Path("mell-plan"),
    weights_gib: Annotated[
        float | None,
        typer.Option(metavar="GIB", min=0.001, help="Size of the weights.", rich_help_panel=_MODEL),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="'auto' (the model's) or 'fp8'.", rich_help_panel=_MODEL)
    ] = "auto",
    gpu_memory_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of a GPU.", rich_help_panel=_GPU)
    ] = None,
    gpu_memory_gb_per_s: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Memory bandwidth.", rich_help_panel=_GPU)
    ] = None,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(metavar="TFLOP/S", help="Dense bf16 TFLOP/s.", rich_help_panel=_GPU),
    ] = None,
    gpu_price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="USD", help="US dollars; the table's are rough guesses.", rich_help_panel=_GPU
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="Share for weights and KV.", rich_help_panel=_GPU)
    ] = 0.9,
    gpus_per_replica: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="GPUs that share one copy of the weights. Default: the fewest that hold them and "
            "a request of p99.9 size.",
            rich_help_panel=_REPLICA,
        ),
    ] = None,
    gpu_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="KV tokens that a replica holds.",
            rich_help_panel=_REPLICA,
        ),
    ] = None,
    decode_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0.001,
            help="Decode speed of a request on a full GPU.",
            rich_help_panel=_REPLICA,
        ),
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", min=0.001, help="Prefill speed of a replica.", rich_help_panel=_REPLICA
        ),
    ] = None,
    link_gb_per_s: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S",
            min=0.001,
            help="What a GPU sends to another, GB/s. Default: 100 Gbit/s network.",
            rich_help_panel=_REPLICA,
        ),
    ] = None,
    migration_price: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Replica-seconds that a migrated token costs. Default: the time to send it.",
            rich_help_panel=_REPLICA,
        ),
    ] = None,
    startup_s: cli.StartupOption = 30.0,
    forecast: cli.ForecastOption = None,
    initial_gpus: cli.InitialOption = 0,
    idle_grace_s: cli.GraceOption = None,
    spare_gpus: cli.SpareOption = 0,
    max_gpus: cli.MaxGpusOption = None,
    max_requests_per_gpu: cli.MaxRequestsOption = None,
    gpus_per_node: cli.NodeOption = 1,
    epoch_tokens: cli.EpochOption = 16,
    spread_ties: cli.SpreadOption = False,
    time_compression: cli.CompressionOption = 1.0,
    copies: cli.CopiesOption = 1.0,
    measure_from: cli.MeasureFromOption = 0.03,
    drain: cli.DrainOption = False,
    seed: cli.SeedOption = 0,
) -> None:
    """For a trace of yours: the GPUs each policy needs, GPU-hours, money, migrations.

    KV bytes per token come from the model's config, speeds from the GPU's data sheet, prices are
    assumptions: everything it rests on is printed with its source, and every figure can be given.
    """
    from mell_ray.simulation.eventlog import check_outputs
    from mell_ray.simulation.hardware import find_gpu, override_gpu
    from mell_ray.simulation.modelspec import model_spec
    from mell_ray.simulation.sizing import SizingOverrides, size_replica, sizing_advice
    from mell_ray.simulation.study import Study, summarise, total_tokens_p999
    from mell_ray.simulation.types import SimOptions

    check_outputs(out / "plan.json")
    names = _policy_names(policies)
    prices = _prices(sweep_prices)
    card = override_gpu(
        find_gpu(gpu),
        memory_gib=gpu_memory_gib,
        memory_gb_per_s=gpu_memory_gb_per_s,
        bf16_tflops=gpu_tflops,
        price_per_hour=gpu_price_per_hour,
    )
    spec = model_spec(model, kv_cache_dtype=kv_cache_dtype, weights_gib=weights_gib)
    rows = cli.load_trace(trace, spread_seed=seed if spread_ties else None)
    given = SizingOverrides(
        gpus_per_replica=gpus_per_replica,
        capacity_tokens=gpu_tokens,
        decode_tokens_per_s=decode_tokens_per_s,
        prefill_tokens_per_s=prefill_tokens_per_s,
        link_gb_per_s=link_gb_per_s,
    )
    size = size_replica(
        card,
        spec,
        needed_tokens=total_tokens_p999(rows),
        memory_utilization=gpu_memory_utilization,
        overrides=given,
    )
    foresee, grace_s = cli.fleet_defaults(startup_s, forecast, idle_grace_s)
    options = SimOptions(
        gpu_tokens=size.capacity_tokens,
        decode_tokens_per_s=size.decode_tokens_per_s,
        epoch_tokens=epoch_tokens,
        migration_price=size.migration_price if migration_price is None else migration_price,
        startup_s=startup_s,
        forecast=foresee,
        initial_gpus=initial_gpus,
        idle_grace_s=grace_s,
        spare_gpus=spare_gpus,
        max_gpus=max_gpus,
        gpus_per_node=max(1, gpus_per_node // size.gpus),
        max_requests_per_gpu=max_requests_per_gpu,
        kv_bytes_per_token=round(size.kv_bytes_per_token),
        link_bytes_per_s=size.link_tokens_per_s * size.kv_bytes_per_token,
        prefill_tokens_per_s=size.prefill_tokens_per_s,
        time_compression=time_compression,
        copies=copies,
        measure_from_share=measure_from,
        measure_drain=drain,
        seed=seed,
    )
    study = Study(
        title=f"{_model_name(model)} on {card.name}",
        trace=summarise(cli.trace_name(trace), rows),
        migration_price=options.migration_price,
        gpus_per_replica=size.gpus,
        kv_bytes_per_token=size.kv_bytes_per_token,
        gpu_price_per_hour=card.price_per_hour,
        assumptions=_assumptions(
            card,
            spec,
            size,
            options,
            given,
            weights_given=weights_gib is not None,
            price_given=gpu_price_per_hour is not None,
            migration_price_given=migration_price is not None,
        ),
    )
    advice = sizing_advice(card, spec, size, memory_utilization=gpu_memory_utilization)
    if gpus_per_replica is None and gpu_tokens is None and advice:
        study.notes.append(advice)
    study.notes.extend(_model_notes(spec, rows))
    _run_all(study, rows, options, names, prices)
    study.notes.extend(cli.workload_notes(study))
    _write(study, out)


def _policy_names(text: str) -> list[str]:
    """The policies named, or all; checked now, not after the first ones have run for minutes."""
    from mell_ray.scheduler.policies import find_policy, policy_names

    if not text:
        return sorted(policy_names(), key=lambda name: name != "tide")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        find_policy(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"--policies {text!r} names one twice")
    return names


def _prices(text: str) -> list[float]:
    prices = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            price = float(part)
        except ValueError:
            raise ConfigError(f"--sweep-prices: {part!r} is not a number") from None
        if not 0 <= price < float("inf"):
            raise ConfigError(f"--sweep-prices: {part!r} is not a price of 0 or more")
        prices.append(price)
    return prices


def _model_name(model: str) -> str:
    """The last part of an id or path that says something."""
    path = Path(model)
    return (path.parent.resolve() if path.name == "config.json" else path).name


def _model_notes(spec: ModelSpec, rows: Sequence[TraceRow]) -> list[str]:
    notes = list(spec.notes)
    if spec.max_model_len is not None:
        limit = spec.max_model_len
        long = sum(row.prompt_tokens + row.output_tokens > limit for row in rows)
        if long:
            notes.append(
                f"longer than the model's context of {limit:,} tokens: {long:,} of the requests"
            )
    return notes


def _assumptions(
    card: Gpu,
    spec: ModelSpec,
    size: ReplicaSize,
    options: SimOptions,
    given: SizingOverrides,
    *,
    weights_given: bool,
    price_given: bool,
    migration_price_given: bool,
) -> list[Assumption]:
    from mell_ray.simulation.hardware import GIB
    from mell_ray.simulation.study import Assumption

    def source(value: object, otherwise: str) -> str:
        return "given" if value else otherwise

    replica = f"{size.gpus} x {card.name}, {card.memory_gib:g} GiB each"
    kv = f"{size.kv_bytes_per_token / 1024:,.4g} KiB"
    price = f"${card.price_per_hour:,.2f}"
    return [
        Assumption("replica", replica, source(given.gpus_per_replica, "fewest GPUs that fit")),
        Assumption(
            "weights",
            f"{spec.weight_bytes / GIB:,.1f} GiB",
            source(weights_given, "shapes in the model config, within 2 % or so"),
        ),
        Assumption("KV per token", kv, "model config"),
        Assumption(
            "KV tokens per replica",
            f"{size.capacity_tokens:,}",
            source(given.capacity_tokens, "memory left beside the weights"),
        ),
        Assumption(
            "decode speed",
            f"{size.decode_tokens_per_s:,.1f} tokens/s a request",
            source(given.decode_tokens_per_s, "estimate: 70 % of memory bandwidth, full pool"),
        ),
        Assumption(
            "prefill speed",
            f"{size.prefill_tokens_per_s:,.0f} tokens/s a replica",
            source(given.prefill_tokens_per_s, "estimate: 50 % of dense bf16"),
        ),
        Assumption(
            "KV transfer",
            f"{size.link_tokens_per_s:,.0f} tokens/s a replica",
            source(given.link_gb_per_s, "assumption: 100 Gbit/s a GPU"),
        ),
        Assumption(
            "migration price",
            f"{options.migration_price:.3g} replica-seconds a token",
            source(migration_price_given, "estimate: time to send or recompute it"),
        ),
        Assumption("GPU price an hour", price, source(price_given, "assumption: set your own")),
        Assumption("start-up", f"{options.startup_s:g} s, billed", "option --startup-s"),
        Assumption(
            "measured",
            f"from {100 * options.measure_from_share:g} % of the trace to "
            + ("the end" if options.measure_drain else "the last arrival"),
            "options --measure-from, --drain",
        ),
    ]


def _run_all(
    study: Study,
    rows: Sequence[TraceRow],
    options: SimOptions,
    names: Sequence[str],
    prices: Sequence[float],
) -> None:
    """Every policy, then the first one again at each price of the sweep."""
    from dataclasses import replace

    todo = [(name, replace(options, policy=name), False) for name in names]
    for price in prices:
        swept = replace(options, policy=names[0], migration_price=price)
        todo.append((f"{names[0]} @ {price:g}", swept, True))
    with cli.progress_bar() as start:
        for label, chosen, variant in todo:
            run = cli.run_policy(rows, chosen, label=label, variant=variant, progress=start(label))
            study.runs.append(run)


def _write(study: Study, out: Path) -> None:
    from mell_ray.simulation.html import draw, render_html
    from mell_ray.simulation.report import print_study

    over_time, pareto = draw(study)
    command = shlex.join(["mell-ray", *sys.argv[1:]])
    page = render_html(study, over_time=over_time, pareto=pareto, command=command)
    files = {
        "report.html": page.encode(),
        "gpus_over_time.png": over_time[0],
        "pareto.png": pareto[0],
    }
    cli.write_json(study, str(out / "plan.json"))
    for name, content in files.items():
        try:
            (out / name).write_bytes(content)
        except OSError as error:
            raise ConfigError(f"cannot write {out / name}: {error.strerror}") from None
    console = cli.output_console()
    print_study(study, console)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False)
