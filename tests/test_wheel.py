"""A wheel of this repository, used away from it, serves the built-in model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from mell_ray.builtin import MODEL_ID
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
START = "from mell_ray.cli import main; main()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content; its dependencies are this environment's."""
    where = tmp_path_factory.mktemp("wheel")
    source = where / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(where)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    wheel = next(where.glob("*.whl"))
    target = where / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--no-index", "--disable-pip-version-check", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True, capture_output=True)
    return target


def environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}


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
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=90) == 0
