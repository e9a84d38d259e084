"""Every policy on every trace: GPU-seconds and migrated tokens against the lower bound.

    python load_tests/scheduler_matrix.py TRACES_FOLDER [--seconds 600] [--epoch-tokens 16]

For each trace and each f, a GPU holds C = p99.9(prompt + output) / f tokens, larger requests are
left out, and copies of the trace at independent circular time shifts (or a thinned one) are
superposed on its own time scale up to a mean lower bound of about 25 GPUs. Writes one JSON line per
run, which a second call reuses, and the tables of ``scheduler_matrix.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mell_ray.simulation.loop import simulate
from mell_ray.simulation.trace import read_trace
from mell_ray.simulation.transform import drop_larger, spread_ties
from mell_ray.simulation.types import SimOptions, TraceRow

FACTORS = (0.8, 0.3, 0.05)
MEAN_GPUS = 25.0
DECODE = 30.0
RUNS: dict[str, tuple[str, dict[str, Any], float]] = {
    "tide, price 0": ("tide", {}, 0.0),
    "tide, price 1e-5": ("tide", {}, 1e-5),
    "tide, price 1e-4": ("tide", {}, 1e-4),
    "mell": ("mell", {}, 1e-5),
    "best-fit": ("best-fit", {}, 1e-5),
    "best-fit + drain": ("best-fit", {"consolidate": True}, 1e-5),
    "first-fit": ("first-fit", {}, 1e-5),
    "worst-fit": ("worst-fit", {}, 1e-5),
    "llumnix": ("llumnix", {}, 1e-5),
}
TIDE_AT = {1e-5: "tide, price 1e-5", 1e-4: "tide, price 1e-4"}


@dataclass(frozen=True)
class Case:
    trace: str
    factor: float
    gpu_tokens: int
    copies: float
    rows: list[TraceRow]


def cases(folder: Path, factors: list[float], seconds: float) -> Iterator[Case]:
    paths = sorted(folder.glob("*.csv*"))
    if not paths:
        raise SystemExit(f"{folder}: there are no traces (.csv, .csv.gz) in it")
    for path in paths:
        rows = read_trace(path)
        if len({r.arrival_s for r in rows}) < len(rows) / 2:
            rows = spread_ties(rows, Random(1))  # recorded on a coarse clock
        totals = sorted(r.prompt_tokens + r.output_tokens for r in rows)
        large = totals[int(0.999 * len(totals))]
        for factor in factors:
            capacity = int(large / factor)
            kept = drop_larger(rows, capacity)
            held = sum((r.prompt_tokens + r.output_tokens / 2) * r.output_tokens for r in kept)
            mean = held / DECODE / rows[-1].arrival_s / capacity
            kept = [r for r in kept if r.arrival_s <= seconds]
            yield Case(path.name.split(".")[0], factor, capacity, MEAN_GPUS / mean, kept)


def run(case: Case, name: str, args: argparse.Namespace) -> dict[str, Any]:
    policy, params, price = RUNS[name]
    options = SimOptions(
        gpu_tokens=case.gpu_tokens,
        policy=policy,
        params=params,
        decode_tokens_per_s=DECODE,
        epoch_tokens=args.epoch_tokens,
        report_tokens=args.report_tokens,
        migration_price=price,
        copies=case.copies,
        measure_from_share=0.03,
        measure_drain=False,
        seed=args.seed,
    )
    begin = time.process_time()
    result = simulate(case.rows, options)
    return {
        "trace": case.trace,
        "f": case.factor,
        "run": name,
        "epoch_tokens": args.epoch_tokens,
        "report_tokens": args.report_tokens,
        "seconds": args.seconds,
        "seed": args.seed,
        "gpu_tokens": case.gpu_tokens,
        "copies": round(case.copies, 3),
        "requests": result.requests,
        "bound": result.lower_bound_gpu_seconds / result.duration_s,
        "ratio": result.ratio,
        "recourse": result.recourse,
        "j5": result.cost(1e-5),
        "j4": result.cost(1e-4),
        "migrations_per_request": result.migrations / max(1, result.requests),
        "preemptions": result.preemptions,
        "cpu_s": round(time.process_time() - begin, 1),
    }


def geomean(values: list[float]) -> float:
    return math.exp(sum(math.log(max(v, 1e-12)) for v in values) / len(values))


def table(results: list[dict[str, Any]]) -> str:
    """The tables in Markdown, from the lines of finished runs."""
    names = [n for n in RUNS if any(r["run"] == n for r in results)]
    found = {(r["trace"], r["f"], r["run"]): r for r in results}
    keys = sorted({(r["trace"], r["f"]) for r in results}, key=lambda k: (-k[1], k[0]))
    keys = [k for k in keys if all((*k, n) in found for n in names)]
    lines = []
    for title, factors in (("f = 0.3 and 0.8", (0.3, 0.8)), ("all", (0.05, 0.3, 0.8))):
        chosen = [k for k in keys if k[1] in factors]
        if not chosen:
            continue
        lines += [f"### Geometric means over {len(chosen)} cases, {title}", ""]
        lines += [
            "| policy | GPU-seconds / bound | worst | tokens moved | J(1e-5) | J(1e-4) |",
            "|---|---|---|---|---|---|",
        ]
        for name in names:
            rows = [found[(*k, name)] for k in chosen]
            means = {c: geomean([r[c] for r in rows]) for c in ("ratio", "recourse", "j5", "j4")}
            worst = max(r["ratio"] for r in rows)
            lines.append(
                f"| {name} | {means['ratio']:.4f} | {worst:.3f} | {means['recourse']:.3f} "
                f"| {means['j5']:.4f} | {means['j4']:.4f} |"
            )
        lines.append("")
    lines += ["### Each case: GPU-seconds / bound, tokens moved per token", ""]
    lines += ["| trace, f | bound | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for key in keys:
        rows = [found[(*key, n)] for n in names]
        cells = " | ".join(f"{r['ratio']:.3f} / {r['recourse']:.2f}" for r in rows)
        lines.append(f"| {key[0]}, {key[1]} | {rows[0]['bound']:.1f} | {cells} |")
    if not set(TIDE_AT.values()) <= set(names):
        return "\n".join(lines) + "\n"
    lines += ["", "### Each case: J(1e-5) and J(1e-4), `tide` run at that price", ""]
    others = [n for n in names if not n.startswith("tide")]
    lines += ["| trace, f | tide | " + " | ".join(others) + " |", "|---" * (len(others) + 2) + "|"]
    for key in keys:
        tide = [found[(*key, TIDE_AT[p])] for p in (1e-5, 1e-4)]
        cells = [f"{tide[0]['j5']:.4f}, {tide[1]['j4']:.4f}"]
        for name in others:
            row = found[(*key, name)]
            cells.append(f"{row['j5']:.4f}, {row['j4']:.4f}")
        lines.append(f"| {key[0]}, {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with CSV traces")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="of each trace, from its start"
    )
    parser.add_argument("--epoch-tokens", type=int, default=16)
    parser.add_argument("--report-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--factors", default=",".join(map(str, FACTORS)))
    parser.add_argument("--runs", default=";".join(RUNS), help="names, separated by ';'")
    parser.add_argument("--results", type=Path, default=Path("scheduler_matrix.jsonl"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file to write")
    args = parser.parse_args()
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    setting = ("epoch_tokens", "report_tokens", "seconds", "seed")
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            if all(row[name] == getattr(args, name) for name in setting):
                done[row["trace"], row["f"], row["run"]] = row
    factors = [float(f) for f in args.factors.split(",")]
    for case in cases(args.traces, factors, args.seconds):
        for name in args.runs.split(";"):
            if (case.trace, case.factor, name) not in done:
                row = run(case, name, args)
                done[case.trace, case.factor, name] = row
                with args.results.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(
                    f"{case.trace} f={case.factor} {name}: ratio {row['ratio']:.4f} "
                    f"moved {row['recourse']:.3f} J5 {row['j5']:.4f} J4 {row['j4']:.4f}",
                    flush=True,
                )
    text = table([r for r in done.values() if r["f"] in factors])
    print(text)
    if args.table is not None:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
