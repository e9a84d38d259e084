"""Every set of values is accepted by helm, by Kubernetes' schemas and by the CRDs'."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.support import (
    CHART,
    CRDS,
    KUBERNETES,
    VALUE_SETS,
    HelmError,
    Manifest,
    StrictLoader,
    as_pod,
    crd_schema,
    helm,
    of_kind,
    pod_templates,
    rayservice,
    render,
    validate,
)

CUSTOM = ("ray.io", "monitoring.coreos.com")
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason="MELL_CRDS names no directory with KubeRay's and Prometheus' CRDs"
)
RULES = """\
groups:
  - name: mell
    rules:
      - alert: Slow
        expr: vector(1) > 0
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: '{{ $labels.instance }} is slow: {{ $value | humanize }}'
"""


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart with rules and a dashboard in it, whatever files/ holds at the moment."""
    chart = tmp_path_factory.mktemp("chart") / "mell-ray"
    shutil.copytree(CHART, chart)
    (chart / "files" / "alerts.yaml").write_text(RULES)
    (chart / "files" / "dashboard.json").write_text('{"title": "{{ instance }}"}')
    return chart


@pytest.fixture(scope="module", params=VALUE_SETS)
def manifests(request: pytest.FixtureRequest, monitored: Path) -> list[Manifest]:
    return render(VALUE_SETS[request.param], chart=monitored)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_lint(name: str) -> None:
    values = VALUE_SETS[name]
    helm("lint", "--strict", CHART, *(["--values", values] if values else []))


def test_packs() -> None:
    text = helm("show", "chart", CHART)
    assert yaml.safe_load(text)["name"] == "mell-ray"


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_core_kinds(manifests: list[Manifest], kubernetes: str) -> None:
    kinds = set()
    for manifest in manifests:
        if manifest["apiVersion"].split("/")[0] in CUSTOM:
            continue
        validate(manifest, kubernetes)
        kinds.add(manifest["kind"])
    assert {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Pod"} <= kinds
    for template in pod_templates(manifests).values():
        validate(as_pod(template), kubernetes)


@needs_crds
def test_custom_kinds(manifests: list[Manifest]) -> None:
    custom = [m for m in manifests if m["apiVersion"].split("/")[0] in CUSTOM]
    for manifest in custom:
        validate(manifest, KUBERNETES[-1])
    assert "RayService" in {m["kind"] for m in custom}


@needs_crds
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfig", "autoscalerOptions", "idleTimeoutSecond"), 5),
        (("spec", "rayClusterConfig", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "container"), []),
    ],
)
def test_the_validator_of_custom_kinds_refuses(path: tuple[str | int, ...], value: object) -> None:
    """A check that accepts everything would be no check."""
    service = copy.deepcopy(rayservice(render()))
    target = service
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd_schema("RayService")).validate(service)


def test_the_validator_of_core_kinds_refuses() -> None:
    (account,) = of_kind(render(), "ServiceAccount")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(account | {"automountServiceAccountTokens": False}, KUBERNETES[-1])


def test_the_loader_refuses_a_key_that_stands_twice() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        yaml.load("a: 1\na: 2\n", StrictLoader)


def test_monitoring(monitored: Path) -> None:
    manifests = render(VALUE_SETS["node-8gpu"], chart=monitored)
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES)  # with Prometheus' own braces
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    (dashboards,) = of_kind(manifests, "ConfigMap")
    assert dashboards["data"]["mell-ray-dashboard.json"].strip() == '{"title": "{{ instance }}"}'
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    monitors = of_kind(manifests, "PodMonitor")
    ports = {
        m["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: [
            endpoint["port"] for endpoint in m["spec"]["podMetricsEndpoints"]
        ]
        for m in monitors
    }
    assert ports == {"head": ["metrics", "as-metrics", "dash-metrics"], "worker": ["metrics"]}
    for name, template in pod_templates(manifests).items():
        offered = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert set(ports["head" if name == "head" else "worker"]) <= offered


@needs_crds
def test_the_committed_rules_and_dashboards_are_taken() -> None:
    manifests = render(VALUE_SETS["node-8gpu"])
    (rule,) = of_kind(manifests, "PrometheusRule")
    validate(rule, KUBERNETES[-1])
    (dashboards,) = of_kind(manifests, "ConfigMap")
    assert all(json.loads(text) for text in dashboards["data"].values())
    assert len(str(dashboards)) < 1 << 20  # what the API server takes


def test_without_rules_or_dashboards_nothing_is_made_of_them(tmp_path: Path) -> None:
    chart = tmp_path / "mell-ray"
    shutil.copytree(CHART, chart)
    for path in chart.glob("files/*"):
        if path.suffix in (".json", ".yaml"):
            path.unlink()
    kinds = {m["kind"] for m in render(VALUE_SETS["node-8gpu"], chart=chart)}
    assert "PodMonitor" in kinds
    assert not kinds & {"PrometheusRule", "ConfigMap"}


def test_routes_lead_to_the_service_that_kuberay_makes() -> None:
    route = {
        "enabled": True,
        "parentRefs": [{"name": "gateway", "namespace": "net", "sectionName": "https"}],
        "hostnames": ["llm.example.com"],
        "requestTimeout": "3600s",
    }
    manifests = render(
        VALUE_SETS["multi-model"], options=("--set-json", f"httpRoute={json.dumps(route)}")
    )
    service = f"{rayservice(manifests)['metadata']['name']}-serve-svc"
    (made,) = of_kind(manifests, "HTTPRoute")
    (rule,) = made["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service, "port": 8000}]
    assert rule["timeouts"] == {"request": "3600s"}
    assert made["spec"]["hostnames"] == route["hostnames"]
    assert made["spec"]["parentRefs"] == route["parentRefs"]
    (ingress,) = of_kind(manifests, "Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": service, "port": {"number": 8000}}


def test_extra_objects_are_rendered() -> None:
    extra = {
        m["metadata"]["name"]: m for m in of_kind(render(VALUE_SETS["multi-model"]), "ConfigMap")
    }
    assert extra["rel-mell-ray-extra"]["data"] == {"service": "rel-mell-ray-serve-svc"}
    assert "rel-mell-ray-text" in extra


def test_old_kubernetes_is_refused() -> None:
    with pytest.raises(HelmError, match="kubeVersion"):
        render(options=("--kube-version", "1.25.0"))
