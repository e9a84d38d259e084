"""``mell-ray bench throughput`` on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mell_ray.bench.closed_loop import run_closed_loop
from mell_ray.bench.summary import RequestTimes, percentiles_ms, summarise
from mell_ray.bench.workload import BenchRequest
from mell_ray.cli import app
from tests.engine.support import VOCAB, engine, prompts

_TICK_S = 0.02  # the kernel counts a process's start in hundredths


def test_figures_of_known_times() -> None:
    first = RequestTimes(10.0, [10.5, 10.6, 10.8])
    second = RequestTimes(11.0, [11.1])
    figures = summarise([first, second], duration_s=2.0)
    assert figures["output_tokens"] == 4
    assert figures["output_tokens_per_s"] == 2.0
    assert figures["ttft_ms"]["p50"] == pytest.approx(300)  # type: ignore[index]
    assert figures["itl_ms"]["mean"] == pytest.approx(150)  # type: ignore[index]
    assert figures["e2e_ms"]["p99"] == pytest.approx(793)  # type: ignore[index]


def test_nothing_to_count_is_not_zero() -> None:
    assert percentiles_ms([]) == {"p50": None, "p99": None, "mean": None}


def test_closed_loop_keeps_its_concurrency_and_runs_everything() -> None:
    subject = engine(num_gpu_blocks_override=200)
    asked = [BenchRequest(prompt, 1 + i % 5) for i, prompt in enumerate(prompts(12))]
    most = 0
    plain_step = subject.step

    def watched_step() -> object:
        nonlocal most
        stats = subject.stats()
        most = max(most, stats.running + stats.waiting)
        return plain_step()

    subject.step = watched_step  # type: ignore[method-assign,assignment]
    finished: list[int] = []
    times, duration = run_closed_loop(subject, asked, 3, finished.append)
    assert most == 3
    assert [len(t.tokens_s) for t in times] == [request.output_len for request in asked]
    assert sum(finished) == sum(request.output_len for request in asked)
    assert all(t.submitted_s < t.tokens_s[0] <= t.tokens_s[-1] for t in times)
    assert 0 < times[-1].tokens_s[-1] - times[0].submitted_s <= duration


def test_age_of_a_process_is_no_more_than_its_parent_saw() -> None:
    code = "from mell_ray.bench.machine import seconds_since_process_start as age; print(age())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= time.monotonic() - before + _TICK_S


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    from tests.engine.support import TINY, build

    path = tmp_path_factory.mktemp("model")
    build(LlamaConfig(**TINY)).save_pretrained(path)
    return path


def test_the_command_writes_what_it_measured(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = "--num-prompts 5 --input-len 9 --output-len 3:4 --concurrency 2 --threads 1"
    command = ["bench", "throughput", "--model", str(model_dir), *options.split()]
    done = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "output tokens/s" in done.output
    result = json.loads(out.read_text())
    assert result["num_requests"] == 5
    assert result["prompt_tokens"] == 45
    assert 15 <= result["output_tokens"] <= 20
    assert result["output_tokens_per_s"] == result["output_tokens"] / result["duration_s"]
    for key in ("ttft_ms", "itl_ms"):
        assert 0 <= result[key]["p50"] <= result[key]["p99"]
    assert result["cold_start_s"] >= result["load_s"] > 0
    assert result["preemptions"] == result["prefix_hit_tokens"] == 0
    assert result["settings"]["concurrency"] == 2


def test_given_requests_are_the_ones_that_run(model_dir: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "result.json", tmp_path / "requests.json"
    asked = [{"prompt_token_ids": [5, VOCAB - 1, 7], "output_len": n} for n in (2, 3)]
    file.write_text(json.dumps(asked))
    command = ["bench", "throughput", "--model", str(model_dir), "--requests", str(file)]
    done = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["num_requests"], result["output_tokens"]) == (2, 5)


def test_what_does_not_fit_is_refused_in_words(model_dir: Path) -> None:
    command = ["bench", "throughput", "--model", str(model_dir), "--input-len", "250"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "does not fit into the model's 256" in done.output


def test_a_wrong_dtype_is_refused_by_name(model_dir: Path) -> None:
    command = ["bench", "throughput", "--model", str(model_dir), "--dtype", "int3"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "dtype" in done.output
