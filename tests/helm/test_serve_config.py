"""The Serve configuration in the RayService is one that Ray takes and mell-ray builds from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from mell_ray.config import MellConfig
from mell_ray.serving import build_openai_app
from tests.helm.support import VALUE_SETS, StrictLoader, rayservice, render

KEYS = "/etc/mell-ray/keys"


def serve_config(values: Any) -> dict[str, Any]:
    return yaml.load(rayservice(render(values))["spec"]["serveConfigV2"], StrictLoader)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_ray_takes_it_and_the_application_builds(name: str, tmp_path: Path) -> None:
    for keys in ("clients", "operators"):
        (tmp_path / keys).mkdir()
        (tmp_path / keys / "team").write_text("key")
    # As in a pod with the Secrets mounted.
    text = json.dumps(serve_config(VALUE_SETS[name])).replace(KEYS, str(tmp_path))
    config = json.loads(text)
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "mell_ray.serving:build_openai_app"
    build_openai_app(application.args)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8000)


def test_settings_arrive_as_they_were_written() -> None:
    mell = {"epoch_s": 0.5, "policy": {"name": "mell", "params": {}}, "seed": 12345678901}
    engine = {"kv_cache_memory_bytes": 1073741824, "revision": "1e5"}
    models = [
        {
            "model_loading_config": {"model_id": "m", "model_source": "builtin"},
            "accelerator_type": "CPU",
            "engine_kwargs": engine,
        }
    ]
    config = serve_config({"serve.models": models, "serve.mell": mell, "serve.appName": "other"})
    (application,) = config["applications"]
    assert application["name"] == "other"
    parsed = MellConfig.parse(application["args"])
    assert parsed.mell.epoch_s == 0.5
    assert parsed.mell.seed == 12345678901
    assert parsed.mell.policy.name == "mell"
    assert parsed.llm_configs[0].engine_kwargs.kv_cache_memory_bytes == 1073741824
    assert parsed.llm_configs[0].engine_kwargs.revision == "1e5"


def test_keys_are_added_to_those_of_the_settings() -> None:
    (application,) = serve_config(
        {"apiKeys.clientsSecret": "s", "serve.mell.auth": {"clients": {"files": ["/mine"]}}}
    )["applications"]
    auth = MellConfig.parse(application["args"]).mell.auth
    assert auth.clients.files == ["/mine", f"{KEYS}/clients"]
    assert not auth.operators.given
