"""README, schema, notes and the test pod follow from the values and do what they say."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.helm.support import CHART, ROOT, VALUE_SETS, Manifest, of_kind, render


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("generate", ROOT / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        for name in ("generate", "schema"):
            sys.modules.pop(name, None)


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    for path, text in generate.outputs().items():
        assert path.read_text() == text, f"run `python helm/generate.py`: {path.name} is stale"


def test_every_value_is_documented(generate: ModuleType) -> None:
    source = (CHART / "values.yaml").read_text()
    paths = {setting.path for setting in generate.documented(source)}

    def leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if path in paths and not any(p[:-1] == path for p in paths):
            return
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from leaves(item, (*path, key))
        else:
            yield path

    assert list(leaves(yaml.safe_load(source), ())) == []


def test_schema_knows_every_value() -> None:
    """Otherwise a default could not be repeated by a user."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) <= set(schema["properties"])


def notes(tmp_path: Path, values: Path | None, changes: dict[str, Any] | None = None) -> str:
    """NOTES.txt is only rendered by a server; the template behind it can be rendered here."""
    chart = tmp_path / "mell-ray"
    if not chart.exists():
        shutil.copytree(CHART, chart)
        probe = 'kind: Notes\ntext: {{ include "mell-ray.notes" . | quote }}\n'
        (chart / "templates" / "probe.yaml").write_text(probe)
    (found,) = of_kind(render(changes or values, chart=chart), "Notes")
    return found["text"]


def test_notes(tmp_path: Path) -> None:
    assert (CHART / "templates" / "NOTES.txt").read_text() == '{{ include "mell-ray.notes" . }}\n'
    text = notes(tmp_path, VALUE_SETS["multi-model"])
    assert "port-forward service/rel-mell-ray-serve-svc 8000" in text
    assert "--namespace space" in text
    assert "qwen3-8b, mistral-7b" in text
    assert "By the Ingress: llm.example.com" in text
    assert "a100: 0 to 2, 1 GPUs each, given back after 180 s" in text
    assert "l4: 0 to 4, 1 GPUs each, given back after 60 s" in text
    assert "Authorization: Bearer KEY" in text
    assert "a line of Secret client-keys" in text
    assert "WARNING" not in text


def test_notes_warn(tmp_path: Path) -> None:
    text = notes(tmp_path, None, {"rayAuth.mode": "disabled", "networkPolicy.enabled": False})
    assert text.count("WARNING") == 2
    assert "Authorization" not in text


class Api(http.server.BaseHTTPRequestHandler):
    """As much of the API as the test pod asks for."""

    def do_GET(self) -> None:
        known = {"/health": {}, "/v1/models": {"data": [{"id": "qwen3-0.6b"}]}}
        if self.path == "/v1/models" and self.headers["Authorization"] != "Bearer secret":
            self.send_response(401)
        else:
            self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(self.path, {})).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run_test_pod(manifests: list[Manifest], **env: str) -> subprocess.CompletedProcess[str]:
    (pod,) = of_kind(manifests, "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    given = {e["name"]: e["value"] for e in container["env"]}
    assert given["MELL_URL"] == "http://rel-mell-ray-serve-svc:8000"
    return subprocess.run(
        [sys.executable, "-c", *container["args"]],
        env=os.environ | given | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_helm_test_passes_where_the_model_is_served(api: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("# team\nsecret\n")
    result = run_test_pod(render(), MELL_URL=api, MELL_KEYS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "qwen3-0.6b" in result.stdout


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MELL_MODELS": "qwen3-0.6b other"}, "not served: ['other']"),
        ({"MELL_KEYS": ""}, "answers 401"),
        ({"MELL_URL": "http://127.0.0.1:9", "MELL_TIMEOUT": "0"}, "does not answer"),
    ],
)
def test_helm_test_says_what_is_wrong(
    api: str, tmp_path: Path, env: dict[str, str], message: str
) -> None:
    (tmp_path / "key").write_text("secret\n")
    result = run_test_pod(render(), **({"MELL_URL": api, "MELL_KEYS": str(tmp_path)} | env))
    assert result.returncode != 0
    assert message in result.stderr
