"""``mell-ray simulate``: one policy on one trace, with GPUs given in tokens."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mell_ray.simulation import cli

if TYPE_CHECKING:
    from mell_ray.simulation.types import SimOptions, TraceRow


def simulate(
    trace: cli.TraceArgument,
    gpu_tokens: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="KV tokens that one GPU holds.")
    ],
    policy: Annotated[str, typer.Option(metavar="NAME", help="Scheduling policy.")] = "tide",
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Setting of the policy; repeat.")
    ] = None,
    decode_tokens_per_s: Annotated[
        float, typer.Option(metavar="RATE", min=0.001, help="Decode speed of each request.")
    ] = 30.0,
    migration_price: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="GPU-seconds that one migrated token costs: 1e-5 for NVLink or RDMA, 1e-4 for "
            "Ethernet or recomputation.",
        ),
    ] = 1e-5,
    epoch_tokens: cli.EpochOption = 16,
    report_tokens: cli.ReportOption = 4,
    startup_s: cli.StartupOption = 0.0,
    forecast: cli.ForecastOption = None,
    initial_gpus: cli.InitialOption = 0,
    idle_grace_s: cli.GraceOption = None,
    spare_gpus: cli.SpareOption = 0,
    max_gpus: cli.MaxGpusOption = None,
    max_requests_per_gpu: cli.MaxRequestsOption = None,
    gpus_per_node: cli.NodeOption = 1,
    link_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0.001,
            help="KV tokens a migration sends a second. Default: at once.",
        ),
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None,
        typer.Option(metavar="RATE", min=0.001, help="Prefill speed of a GPU. Default: at once."),
    ] = None,
    spread_ties: cli.SpreadOption = False,
    time_compression: cli.CompressionOption = 1.0,
    copies: cli.CopiesOption = 1.0,
    measure_from: cli.MeasureFromOption = 0.0,
    drain: cli.DrainOption = True,
    seed: cli.SeedOption = 0,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write all figures here; '-' is stdout."),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the event log here (.jsonl or .jsonl.gz)."),
    ] = None,
    save_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the trace as it was run, for 'audit' (.csv or .csv.gz).",
        ),
    ] = None,
) -> None:
    """Run one policy on a trace and report GPUs, the lower bound and migrations.

    Requests larger than a GPU are left out and counted. The same command gives the same event
    log, byte for byte.
    """
    from mell_ray.simulation.eventlog import check_outputs, event_log
    from mell_ray.simulation.report import print_study
    from mell_ray.simulation.study import Assumption, Study, summarise
    from mell_ray.simulation.types import SimOptions

    check_outputs(json_out, save_trace)
    rows = cli.load_trace(trace, spread_seed=seed if spread_ties else None)
    kv_bytes = SimOptions(gpu_tokens=1).kv_bytes_per_token
    foresee, grace_s = cli.fleet_defaults(startup_s, forecast, idle_grace_s)
    options = SimOptions(
        gpu_tokens=gpu_tokens,
        policy=policy,
        params=cli.parse_params(param or ()),
        decode_tokens_per_s=decode_tokens_per_s,
        epoch_tokens=epoch_tokens,
        report_tokens=report_tokens,
        migration_price=migration_price,
        startup_s=startup_s,
        forecast=foresee,
        initial_gpus=initial_gpus,
        spare_gpus=spare_gpus,
        idle_grace_s=grace_s,
        max_gpus=max_gpus,
        gpus_per_node=gpus_per_node,
        max_requests_per_gpu=max_requests_per_gpu,
        link_bytes_per_s=None if link_tokens_per_s is None else link_tokens_per_s * kv_bytes,
        prefill_tokens_per_s=prefill_tokens_per_s,
        time_compression=time_compression,
        copies=copies,
        measure_from_share=measure_from,
        measure_drain=drain,
        seed=seed,
    )
    study = Study(
        title=f"{policy} on {cli.trace_name(trace)}",
        trace=summarise(cli.trace_name(trace), rows),
        migration_price=migration_price,
    )
    with ExitStack() as stack:
        sink = stack.enter_context(event_log(events)) if events else None
        start = stack.enter_context(cli.progress_bar())
        study.runs.append(
            cli.run_policy(rows, options, label=policy, sink=sink, progress=start(policy))
        )
    if save_trace:
        _save_trace(save_trace, rows, options)
    study.assumptions.append(Assumption("KV tokens per GPU", f"{gpu_tokens:,}", "given"))
    study.notes.extend(cli.workload_notes(study))
    if json_out:
        cli.write_json(study, json_out)
    print_study(study, cli.output_console(stderr=json_out == "-"))


def _save_trace(path: Path, rows: list[TraceRow], options: SimOptions) -> None:
    """Copies are numbered after what is too large is left out; without copies nothing is, or the
    rows of the file would no longer have the numbers of the log."""
    from mell_ray.simulation.trace import write_trace
    from mell_ray.simulation.transform import prepare

    as_run, _ = prepare(rows, replace(options, drop_larger=options.copies != 1.0))
    write_trace(path, as_run)
