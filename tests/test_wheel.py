"""A wheel of this repository, used away from it, serves the built-in model."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from transformers import LlamaConfig

from mell_ray.builtin import MODEL_ID
from tests.engine.support import TINY, build
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
START = "from mell_ray.cli import main; main()"


def install(where: Path, **variables: str) -> Path:
    """A folder with nothing but the content of a wheel that was made from a source distribution;
    its dependencies are this environment's."""
    source = where / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    make = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(where), str(source)]
    subprocess.run(make, env={**os.environ, **variables}, check=True, capture_output=True)
    wheel = next(where.glob("*.whl"))
    target = where / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-index", "--disable-pip-version-check", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("wheel")
    hurried = where / "hurried.cfg"
    hurried.write_text("[build_ext]\nparallel = 4\n")
    return install(where, DIST_EXTRA_CONFIG=str(hurried))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"), CC="no-compiler", CXX="no-compiler")


def environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}


def libraries(installed: Path) -> dict[str, Path]:
    """Those that have been compiled, by what ``pyproject.toml`` calls them."""
    paths = (installed / "mell_kernels").glob("*.so")
    return {f"mell_kernels.{path.name.split('.')[0]}": path for path in paths}


def extensions() -> dict[str, dict]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {each["name"]: each for each in project["tool"]["setuptools"]["ext-modules"]}


@pytest.fixture(scope="module")
def compiled(installed: Path) -> Path:
    """``installed``, where this machine can compile for its own CPU."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("no g++, or a CPU that nothing is compiled for")
    return installed


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**TINY, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    build(LlamaConfig(**config)).bfloat16().save_pretrained(path)
    return path


def kernels_of_a_run(installed: Path, model: Path, out: Path) -> str:
    """Whose code has run the layers of ``model``, whose logits are checked when it is loaded."""
    options = "--num-prompts 3 --input-len 9 --output-len 3:4 --concurrency 2 --threads 1"
    command = ["bench", "throughput", "--model", str(model), "--dtype", "bfloat16"]
    subprocess.run(
        [sys.executable, "-c", START, *command, *options.split(), "--json", str(out)],
        cwd=out.parent,
        env=environment(installed),
        check=True,
        capture_output=True,
    )
    result = json.loads(out.read_text())
    assert result["output_tokens"] >= 9
    return result["settings"]["kernels"]


def test_wheel_holds_packages_and_weights(installed: Path) -> None:
    code = (
        "import mell_ray, mell_kernels.ops; from mell_ray.builtin import model_path; "
        "from pathlib import Path; root = Path(mell_ray.__file__).parent; "
        "print(root / 'observability/static/status.html', mell_kernels.ops.__file__, "
        "model_path() / 'model.safetensors')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent,
        env=environment(installed),
        capture_output=True,
        text=True,
        check=True,
    )
    for name in done.stdout.split():
        assert name.startswith(str(installed))
        assert Path(name).exists()


def test_wheel_holds_kernels_for_the_cpus_that_the_compiler_knows(compiled: Path) -> None:
    empty = ["-fsyntax-only", "-x", "c++", "/dev/null"]
    known = {
        name
        for name, each in extensions().items()
        if not subprocess.run(["g++", *each["extra-compile-args"], *empty], check=False).returncode
    }
    assert set(libraries(compiled)) == known


def test_kernels_use_no_more_than_their_cpus_have(compiled: Path) -> None:
    """They have sources in common, and were compiled in parallel."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    for name, path in libraries(compiled).items():
        flags = extensions()[name]["extra-compile-args"]
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True)
        assert ("%zmm" in code.stdout) == ("-march=x86-64-v3" not in flags)
        assert bool(re.search(r"\bv(add|mul|fn?madd\d+)ph\b", code.stdout)) == (
            "-mavx512fp16" in flags
        )


def test_compiled_kernels_run(compiled: Path, bf16_model: Path, tmp_path: Path) -> None:
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("a CPU without AVX2")
    assert kernels_of_a_run(compiled, bf16_model, tmp_path / "result.json") == "compiled"


def test_wheel_of_a_machine_without_compiler(
    without_compiler: Path, bf16_model: Path, tmp_path: Path
) -> None:
    assert not libraries(without_compiler)
    assert kernels_of_a_run(without_compiler, bf16_model, tmp_path / "result.json") == "torch"


def test_wheel_serves(installed: Path, tmp_path: Path) -> None:
    """`mell-ray serve`, with HAProxy, answers, prints the next steps, and stops on an interrupt."""
    port = free_port()
    config = yaml.safe_load((installed / "mell_ray" / "builtin" / "local.yaml").read_text())
    config["http_options"]["port"] = port
    scaling = config["applications"][0]["args"]["llm_configs"][0]["deployment_config"]
    scaling["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 1}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", START, "serve", str(path)],
            cwd=tmp_path,
            env=environment(installed),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 240
            while "curl" not in (tmp_path / "log").read_text():
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": MODEL_ID, "prompt": "It was a truth", "max_tokens": 8},
                timeout=120,
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"]
            assert len(answer.headers.get_list("x-request-id")) == 1
            state = httpx.get(f"http://127.0.0.1:{port}/mell/v1/state", timeout=120).json()
            assert state["replicas"][0]["kernels"] == "torch"  # the model is in float32
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=90) == 0
