"""What GPUs that take time to start cost: billed GPU-seconds and demand that has to wait.

    python load_tests/startup_lag.py TRACES_FOLDER [--lags 2,5,30,120] [--seconds 900]

The cases are those of ``scheduler_matrix.py`` with f = 0.3 and 0.8. GPUs are paid for from the
moment they are asked for; 25 are there at the start. They are opened and kept by the scheduler's
forecast, which is told nothing of the trace and has no setting per trace. Writes one JSON line per
run, which a second call reuses, and the table of the README.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scheduler_matrix import DECODE, MEAN_GPUS, Case, cases, geomean  # type: ignore[import-not-found]

from mell_ray.simulation.loop import simulate
from mell_ray.simulation.types import SimOptions

POLICIES = ("tide", "best-fit", "worst-fit")


def run(case: Case, policy: str, lag: float, seconds: float) -> dict[str, Any]:
    options = SimOptions(
        gpu_tokens=case.gpu_tokens,
        policy=policy,
        decode_tokens_per_s=DECODE,
        migration_price=1e-5,
        copies=case.copies,
        startup_s=lag,
        forecast=True,
        initial_gpus=round(MEAN_GPUS),
        measure_from_share=0.3,  # the forecast starts from nothing
        measure_drain=False,
        seed=1,
    )
    result = simulate(case.rows, options)
    return {
        "trace": case.trace,
        "f": case.factor,
        "policy": policy,
        "lag": lag,
        "seconds": seconds,
        "billed": result.billed_ratio,
        "short": result.demand_short_share,
        "delayed": result.delayed_requests / max(1, result.requests),
        "delay_p99_s": result.delay_p99_s,
        "recourse": result.recourse,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Geometric means per lag and policy, and each case's billed ratio under ``tide``."""
    lags = sorted({r["lag"] for r in results})
    lines = [
        "| lag | policy | billed / bound | demand short, mean (worst) | requests delayed |",
        "|---|---|---|---|---|",
    ]
    for lag in lags:
        for policy in POLICIES:
            rows = [r for r in results if r["lag"] == lag and r["policy"] == policy]
            if not rows:
                continue
            short = [r["short"] for r in rows]
            delayed = sum(r["delayed"] for r in rows) / len(rows)
            lines.append(
                f"| {lag:g} s | {policy} | {geomean([r['billed'] for r in rows]):.3f} "
                f"| {sum(short) / len(short):.2%} ({max(short):.2%}) | {delayed:.1%} |"
            )
    lines += ["", "| trace, f | " + " | ".join(f"{lag:g} s" for lag in lags) + " |"]
    lines.append("|---" * (len(lags) + 1) + "|")
    found = {(r["trace"], r["f"], r["lag"]): r for r in results if r["policy"] == "tide"}
    for trace, factor in sorted({key[:2] for key in found}):
        cells = (found.get((trace, factor, lag)) for lag in lags)
        text = " | ".join(f"{c['billed']:.3f}" if c else "" for c in cells)
        lines.append(f"| {trace}, {factor} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with CSV traces")
    parser.add_argument("--lags", default="2,5,30,120", help="start-up times in seconds")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seconds", type=float, default=900.0, help="of each trace")
    parser.add_argument("--results", type=Path, default=Path("startup_lag.jsonl"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file to write")
    args = parser.parse_args()
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            if row["seconds"] == args.seconds:
                done[row["trace"], row["f"], row["policy"], row["lag"]] = row
    chosen = list(cases(args.traces, [0.3, 0.8], args.seconds))
    for lag in map(float, args.lags.split(",")):
        for policy in args.policies.split(","):
            for case in chosen:
                if (case.trace, case.factor, policy, lag) in done:
                    continue
                row = run(case, policy, lag, args.seconds)
                done[case.trace, case.factor, policy, lag] = row
                with args.results.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(
                    f"{case.trace} f={case.factor} {policy} lag {lag:g}: billed "
                    f"{row['billed']:.3f} short {row['short']:.4f}",
                    flush=True,
                )
    text = table(list(done.values()))
    print(text)
    if args.table is not None:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
