from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mell_ray.cli import app
from mell_ray.scheduler.policies import policy_names

LOAD = "synthetic:gamma,rate=1,cv=2,duration=120,prompt_median=300,output_median=60,seed=3"
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_well(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama-3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


def test_help_needs_neither_torch_nor_ray_nor_matplotlib() -> None:
    code = (
        "import sys; from mell_ray.cli import main; sys.argv = ['mell-ray', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'ray', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "simulate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_simulate_reports_writes_json_and_a_log_that_passes_the_audit(tmp_path: Path) -> None:
    figures, log = tmp_path / "figures.json", tmp_path / "log.jsonl.gz"
    common = ("simulate", LOAD, "--gpu-tokens", 4000, "--policy", "best-fit")
    result = run_well(*common, "--json", figures, "--events", log)
    assert "lower bound" in result.output
    (made,) = json.loads(figures.read_text())["runs"]
    assert made["policy"] == "best-fit"
    assert made["finished"] == made["requests"] > 50
    assert made["gpu_hours"] >= made["lower_bound_gpu_hours"] > 0
    audited = run_well("audit", LOAD, log)
    assert f"{made['finished']:,} requests finished" in audited.output
    assert "no rule is broken" in audited.output


@pytest.mark.parametrize("policy", policy_names())
def test_the_same_command_gives_the_same_log(tmp_path: Path, policy: str) -> None:
    logs = [tmp_path / f"{number}.jsonl" for number in (1, 2)]
    for log in logs:
        run_well("simulate", LOAD, "--gpu-tokens", 4000, "--policy", policy, "--events", log)
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert b'"event":"finish"' in logs[0].read_bytes()


def test_json_on_stdout_is_nothing_but_json() -> None:
    result = run_well("simulate", LOAD, "--gpu-tokens", 4000, "--json", "-")
    assert json.loads(result.stdout)["runs"][0]["policy"] == "tide"
    assert "lower bound" in result.stderr


def test_requests_larger_than_a_gpu_are_left_out_and_said_so(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,9\n1,5000,9\n2,100,9\n")
    log = tmp_path / "log.jsonl"
    result = run_well("simulate", trace, "--gpu-tokens", 4000, "--events", log)
    assert "4,000 KV tokens of a GPU and left out: 1 of 3 requests" in result.output
    audited = run_well("audit", trace, log)
    assert "2 requests finished, 1 larger than any GPU" in audited.output


@pytest.mark.parametrize(
    "load",
    [("--copies", 2.5), ("--time-compression", 2), ("--spread-ties",), ("--copies", 0.5)],
    ids=lambda load: load[0][2:] + str(load[1:]),
)
def test_a_changed_load_is_audited_against_the_saved_trace(
    tmp_path: Path, load: tuple[object, ...]
) -> None:
    trace, log, saved = tmp_path / "t.csv", tmp_path / "log.jsonl", tmp_path / "saved.csv"
    lines = [f"{3 * (n // 5)},{100 + n},40" for n in range(60)]
    lines.insert(20, "9,5000,40")  # larger than a GPU
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines, ""]))
    run_well(
        "simulate", trace, "--gpu-tokens", 1000, "--policy", "best-fit", "--events", log,
        "--save-trace", saved, *load,
    )  # fmt: skip
    assert "no rule is broken" in run_well("audit", saved, log).output
    assert saved.read_text() != trace.read_text()


def test_audit_fails_on_a_log_with_a_line_missing(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run_well("simulate", LOAD, "--gpu-tokens", 4000, "--events", log)
    lines = log.read_text().splitlines(keepends=True)
    finish = next(number for number, line in enumerate(lines) if '"finish"' in line)
    log.write_text("".join(lines[:finish] + lines[finish + 1 :]))
    result = run("audit", LOAD, log)
    assert result.exit_code == 1
    assert "never finished" in result.stderr
    assert "rules are broken" in result.stderr


def test_plan_compares_policies_and_writes_a_report(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    result = run_well(
        "plan", LOAD, "--model", llama, "--gpu", "l4", "--policies", "best-fit,worst-fit",
        "--gpu-price-per-hour", 2.0, "--startup-s", 5, "--sweep-prices", "0", "--out", out,
    )  # fmt: skip
    assert "llama-3-8b" in result.output or "best-fit" in result.output
    made = json.loads((out / "plan.json").read_text())
    assert [entry["run"] for entry in made["runs"]] == ["best-fit", "worst-fit", "best-fit @ 0"]
    assert made["title"] == "llama-3-8b on l4-24g"
    assert made["kv_bytes_per_token"] == 131072
    first = made["runs"][0]
    assert first["billed_usd"] == pytest.approx(2.0 * first["billed_gpu_hours"])
    assert first["migrated_bytes"] == first["migrated_tokens"] * 131072
    options = first["options"]
    assert (options["startup_s"], options["forecast"], options["idle_grace_s"]) == (5, True, 0)
    sources = {item["name"]: item["source"] for item in made["assumptions"]}
    assert sources["GPU price an hour"] == "given"
    assert sources["decode speed"].startswith("estimate")
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    for picture in ("gpus_over_time.png", "pareto.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"


def test_recorded_trace_end_to_end(recorded_traces: Path, tmp_path: Path) -> None:
    trace, log = recorded_traces / "lmsys-arena-vtc.csv.gz", tmp_path / "log.jsonl.gz"
    run_well("simulate", trace, "--gpu-tokens", 4096, "--policy", "tide", "--events", log)
    assert "1,500 requests finished" in run_well("audit", trace, log).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simulate", "nowhere.csv", "--gpu-tokens", 9), "error: trace nowhere.csv: cannot read"),
        (("simulate", "synthetic:poisson", "--gpu-tokens", 9), "rate: is missing"),
        (("simulate", LOAD, "--gpu-tokens", 4000, "--policy", "magic"), "magic"),
        (("simulate", LOAD, "--gpu-tokens", 4000, "--param", "a"), "--param 'a' is not name=value"),
        (("simulate", LOAD, "--gpu-tokens", 4000, "--param", "nonsense=1"), "nonsense"),
        (("plan", LOAD, "--model", "./none.json"), "error: --model ./none.json: there is no"),
        (("plan", LOAD, "--model", ".", "--gpu", "abacus"), "--gpu 'abacus' is not in the"),
        (("plan", LOAD, "--model", ".", "--policies", "best-fit,"), "no policy ''"),
        (("plan", LOAD, "--model", ".", "--policies", "best-fit,magic"), "magic"),
        (("plan", LOAD, "--model", ".", "--policies", "best-fit,best-fit"), "names one twice"),
        (("plan", LOAD, "--model", ".", "--sweep-prices", "0,free"), "'free' is not a number"),
        (("plan", LOAD, "--model", ".", "--sweep-prices", "-1"), "'-1' is not a price"),
        (("simulate", LOAD, "--gpu-tokens", 1), "are larger than the 1 KV tokens of a GPU"),
        (("simulate", LOAD, "--gpu-tokens", 9000, "--copies", 0.001), "--copies 0.001 leaves none"),
        (("simulate", LOAD, "--gpu-tokens", 9000, "--startup-s", "inf"), "startup_s"),
        (("audit", LOAD, "nowhere.jsonl"), "error: event log nowhere.jsonl: cannot read"),
    ],
)
def test_errors_are_one_line_on_stderr_with_exit_code_2(
    arguments: tuple[object, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_malformed_trace_is_named_by_file_line_and_column(tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,many,1\n")
    result = run("simulate", trace, "--gpu-tokens", 10)
    assert result.exit_code == 2
    assert f"{trace}, line 3, column prompt_tokens: 'many' is not a number" in result.stderr


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(
        "plan", LOAD, "--model", llama, "--policies", "best-fit", "--out", tmp_path / "file"
    )
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_what_cannot_be_written_is_named_before_the_run(tmp_path: Path) -> None:
    result = run("simulate", tmp_path / "no-trace.csv", "--gpu-tokens", 9, "--json", tmp_path)
    assert result.exit_code == 2
    assert f"cannot write {tmp_path}" in result.stderr
