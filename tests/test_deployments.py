"""Every file in deployments/ is a valid Serve config from which the application builds."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from mell_ray.errors import ConfigError
from mell_ray.serving import build_openai_app

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "deployments").glob("*.yaml"))


def arguments(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["applications"][0]["args"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_valid_and_builds(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for application in schema.applications:
        assert application.import_path == "mell_ray.serving:build_openai_app"
        build_openai_app(application.args)


def test_every_config_is_described() -> None:
    readme = (ROOT / "deployments" / "README.md").read_text()
    assert {path.name for path in CONFIGS} == set(re.findall(r"^\| `(\S+)`", readme, re.M))
    assert {"local", "local-multi-model", "single-gpu", "node-8gpu", "cluster"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_devices_are_those_of_the_name(path: Path) -> None:
    local = path.name.startswith("local")
    for llm in arguments(path)["llm_configs"]:
        assert llm["accelerator_type"] == ("CPU" if local else "GPU")
        assert (llm["model_loading_config"]["model_source"] == "builtin") is local


def test_packaged_default_is_the_local_deployment() -> None:
    packaged = ROOT / "mell_ray" / "builtin" / "local.yaml"
    assert packaged.read_bytes() == (ROOT / "deployments" / "local.yaml").read_bytes()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("mell", "polcy"), {}, r"mell\.polcy: unknown setting"),
        (("mell", "policy", "name"), "magic", "magic"),
        (("mell", "policy", "params"), {"speed": 1}, "speed"),
        (("llm_configs", 0, "engine_kwargs", "max_num_seqs"), 0, r"0\.engine_kwargs\.max_num_seqs"),
        (
            ("llm_configs", 0, "model_loading_config", "model_source"),
            "/no/such/model",
            "/no/such/model",
        ),
        (
            ("llm_configs", 0, "model_loading_config", "model_source"),
            "/tmp",
            r"no config\.json in '/tmp'",
        ),
        (
            ("llm_configs", 0, "deployment_config", "autoscaling_config", "min_replicas"),
            9,
            "min_replicas",
        ),
    ],
)
def test_wrong_setting_is_named_before_anything_starts(path, value, message) -> None:
    args = copy.deepcopy(arguments(ROOT / "deployments" / "local.yaml"))
    target = args
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        build_openai_app(args)


def test_model_id_twice() -> None:
    args = arguments(ROOT / "deployments" / "local.yaml")
    args["llm_configs"] *= 2
    with pytest.raises(ConfigError, match="twice"):
        build_openai_app(args)
