"""What a wrong configuration is answered with, before anything starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mell_ray.cli import app
from mell_ray.config import MellConfig
from mell_ray.config_errors import FOREIGN
from mell_ray.errors import ConfigError
from mell_ray.serving.checks import check_config


def problem(path: str, value: Any) -> str:
    """The message for a configuration with ``value`` at ``path``; "" where it is right."""
    args: dict[str, Any] = {
        "llm_configs": [{"model_loading_config": {"model_id": "m", "model_source": "builtin"}}]
    }
    target: Any = args
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        target = target[part] if isinstance(part, int) else target.setdefault(part, {})
    target[last] = value
    try:
        check_config(MellConfig.parse(copy.deepcopy(args)))
    except ConfigError as error:
        return str(error)
    return ""


ENGINE = "llm_configs.0.engine_kwargs"
DEPLOYMENT = "llm_configs.0.deployment_config"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("mell.fleat", "fleet"),
        ("mell.fleet.idle_grace", "idle_grace_s"),
        (f"{ENGINE}.max_model_length", "max_model_len"),
        ("llm_configs.0.acelerator_type", "accelerator_type"),
        ("mell.auth.clients.file", "files"),
    ],
)
def test_a_slip_of_the_pen_is_told_what_was_meant(path: str, meant: str) -> None:
    assert problem(path, 1) == f"{path}: unknown setting; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("mell.max_num_seqs", "llm_configs[].engine_kwargs.max_num_seqs"),
        (f"{DEPLOYMENT}.max_queued_requests", "mell.max_queued_requests"),
    ],
)
def test_a_setting_in_the_wrong_section_is_told_where_it_belongs(path: str, right: str) -> None:
    assert problem(path, 8) == f"{path}: unknown setting; there is {right}"


def test_a_setting_like_no_other_is_told_which_there_are() -> None:
    assert "there are: exporter, endpoint," in problem("mell.observability.tracing.zzz", 1)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (f"{ENGINE}.tensor_parallel_size", 2, "a replica has one GPU"),
        (f"{ENGINE}.enable_chunked_prefill", True, "prefill is always chunked"),
        (f"{ENGINE}.trust_remote_code", True, "never run"),
        (f"{ENGINE}.quantization", "awq", "quantised weights"),
        (f"{DEPLOYMENT}.num_replicas", 2, "autoscaling_config.min_replicas"),
        (f"{DEPLOYMENT}.autoscaling_config.target_ongoing_requests", 8, "tpot_target_ms"),
        (f"{DEPLOYMENT}.autoscaling_config.downscale_delay_s", 8, "mell.fleet.idle_grace_s"),
        ("llm_configs.0.runtime_env", {}, "beside import_path"),
        ("llm_configs.0.lora_config", {}, "LoRA is not supported"),
    ],
)
def test_what_ray_serve_llm_has_and_this_has_not_is_refused_with_the_reason(
    path: str, value: Any, reason: str
) -> None:
    message = problem(path, value)
    assert message.startswith(f"{path}: unknown setting (")
    assert reason in message


def names(model: Any) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                found |= names(kind)
    return found


def test_no_setting_of_ours_is_called_foreign_but_where_it_does_not_stand() -> None:
    assert set(FOREIGN) & names(MellConfig) == {"num_replicas", "seed"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mell", None, "mell: must be a mapping of settings, not None"),
        ("llm_configs.0", "model.yaml", "must be a mapping of settings, not 'model.yaml'"),
        ("llm_configs", None, "llm_configs: must be a list, not None"),
        ("llm_configs", [], "llm_configs: must have at least one entry"),
        ("llm_configs.0.model_loading_config", {}, "model_loading_config.model_id: is missing"),
        (f"{ENGINE}.gpu_memory_utilization", "90%", "must be a valid number"),
        (f"{ENGINE}.max_model_len", 0, "must be greater than or equal to 1, not 0"),
        ("mell.epoch_s", float("inf"), "mell.epoch_s: must be a finite number"),
        ("mell.policy", {"name": "Tide"}, "mell.policy: no policy 'Tide'; there are: tide, mell"),
        ("mell.policy", {"params": {"price": "x"}}, "mell.policy: policy 'tide': price must be"),
        ("mell.policy", {"params": {"chain": 1.5}}, "chain must be a whole number, not 1.5"),
        (
            "mell.policy",
            {"name": "best-fit", "params": {"consolidate": "no"}},
            "consolidate must be true or false, not 'no'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(path: str, value: Any, message: str) -> None:
    assert message in problem(path, value)


@pytest.mark.parametrize(
    ("given", "right"),
    [("h100", "H100"), ("NVIDIA_L4", "L4"), ("nvidia A10G", "A10G"), ("cpu", "CPU")],
)
def test_an_accelerator_is_spelled_as_ray_does(given: str, right: str) -> None:
    assert f"Ray's name is {right!r}" in problem("llm_configs.0.accelerator_type", given)


@pytest.mark.parametrize("name", ["H100", "A10G", "GPU", "CPU", "AMD-Instinct-MI100", "MXC500"])
def test_accelerators_that_ray_may_know_are_taken(name: str) -> None:
    assert problem("llm_configs.0.accelerator_type", name) == ""


def test_all_that_is_wrong_is_told_at_once() -> None:
    message = problem(ENGINE, {"max_model_len": 0, "tensor_parallel_size": 2, "block_sise": 4})
    assert message.count(ENGINE) == 3


LOCAL = (Path(__file__).resolve().parents[2] / "deployments" / "local.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "applications: a Serve config needs a list"),
        ("applications: []", "applications: a Serve config needs a list"),
        ("applications: 5", "applications: must be a list, not 5"),
        ("applications: [x]", "applications.0: must be a mapping"),
        ("applications: [{name: x}]", "applications.0.import_path: is missing"),
        (LOCAL.replace("port: 8000", "port: abc"), "http_options.port: must be a valid integer"),
        (LOCAL.replace("http_options", "http_option"), "http_option: unknown setting; did you"),
        (LOCAL.replace("route_prefix", "prefix"), "applications.0.prefix: unknown setting"),
        (LOCAL.replace("accelerator_type", "acelerator_type"), "0.args: llm_configs.0.acelerator"),
        ("a: [", "not valid YAML"),
        (b"\xff\xfe", "not in UTF-8"),
    ],
)
def test_a_serve_config_that_is_wrong_is_named_before_ray_starts(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(app, ["serve", str(path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert message in result.stderr


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot read it: Is a directory" in result.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://host"])
def test_an_operator_call_to_no_address_says_so(url: str) -> None:
    result = CliRunner().invoke(app, ["status", "--once", "--url", url])
    assert result.exit_code == 2
    assert "not an http:// or https:// address" in result.stderr


def test_a_context_longer_than_the_models_is_refused_before_anything_starts() -> None:
    assert "llm_configs[m].engine_kwargs.max_model_len" in problem(f"{ENGINE}.max_model_len", 10**6)
    assert problem(f"{ENGINE}.max_model_len", 4096) == ""


def test_dashboards_go_to_an_address_only() -> None:
    for url in ("grafana:3000", "http://grafana:99999"):
        result = CliRunner().invoke(
            app, ["dashboards", "push", "--url", url], env={"GRAFANA_TOKEN": "t"}
        )
        assert result.exit_code == 2
        assert f"--url: {url!r} is not an http:// or https:// address" in result.stderr
