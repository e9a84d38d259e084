"""What KubeRay, Ray and a cluster's admission want from the pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.support import (
    VALUE_SETS,
    Manifest,
    groups,
    of_kind,
    pod_templates,
    rayservice,
    render,
)

RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.fixture(scope="module", params=VALUE_SETS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(VALUE_SETS[request.param])


def env(template: Manifest) -> dict[str, Any]:
    pairs = template["spec"]["containers"][0]["env"]
    assert len({e["name"] for e in pairs}) == len(pairs), "a variable stands twice"
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in pairs}


def test_pods_pass_the_restricted_standard(manifests: list[Manifest]) -> None:
    (test_pod,) = of_kind(manifests, "Pod")
    for template in [*pod_templates(manifests).values(), test_pod]:
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == RESTRICTED


def test_only_the_heads_autoscaler_gets_a_token(manifests: list[Manifest]) -> None:
    autoscaling = rayservice(manifests)["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    for name, template in pod_templates(manifests).items():
        mounted = template["spec"]["automountServiceAccountToken"]
        assert mounted is (name == "head" and autoscaling)
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_upgrading_the_chart_starts_no_second_cluster(manifests: list[Manifest]) -> None:
    """Whatever in a pod names a version of the chart would."""
    for template in pod_templates(manifests).values():
        labels = template["metadata"]["labels"]
        assert set(labels) == {f"app.kubernetes.io/{n}" for n in ("name", "instance", "component")}
        assert "helm.sh" not in str(template)
        assert "checksum" not in str(template)


def test_kuberay_finds_what_it_needs(manifests: list[Manifest]) -> None:
    head = pod_templates(manifests)["head"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["serve"] == 8000  # without it there is no Service
    service = rayservice(manifests)
    assert service["spec"]["excludeHeadPodFromServeSvc"] is False
    cluster = service["spec"]["rayClusterConfig"]
    assert "name" not in cluster["headGroupSpec"].get("headService", {}).get("metadata", {})
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(isinstance(value, str) for value in group.get("resources", {}).values())
        taken = {"num-cpus", "num-gpus", "memory", "resources", "labels"}
        assert not taken & set(group["rayStartParams"])
    assert cluster["rayVersion"] == "2.60.0"


def test_settings_of_autoscaler_v2_come_with_it(manifests: list[Manifest]) -> None:
    cluster = rayservice(manifests)["spec"]["rayClusterConfig"]
    v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in cluster["workerGroupSpecs"]:
        assert v2 or not {"idleTimeoutSeconds", "priority"} & set(group)
    for template in pod_templates(manifests).values():
        assert template["spec"].get("restartPolicy") == ("Never" if v2 else None)


def test_streams_end_before_pods_are_killed(manifests: list[Manifest]) -> None:
    for name, template in pod_templates(manifests).items():
        drain = int(env(template)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        before = 10 if name == "head" else 0
        assert drain + before < template["spec"]["terminationGracePeriodSeconds"]


def test_haproxy_is_on_in_every_pod_or_in_none() -> None:
    for on in (True, False):
        for template in pod_templates(render({"serve.haproxy": on})).values():
            assert ("RAY_SERVE_ENABLE_HA_PROXY" in env(template)) is on
            assert env(template)["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
            assert env(template)["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] == "0"


def test_gpu_pods() -> None:
    group = groups(render(VALUE_SETS["node-8gpu"]))["h100"]
    container = group["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert group["resources"] == {"accelerator_type:H100": "1"}
    keys = [t["key"] for t in group["template"]["spec"]["tolerations"]]
    assert keys == ["nvidia.com/gpu"]
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (0, 2, 0)


def test_the_routers_resource_is_nowhere_but_on_the_head_and_ingress_pods() -> None:
    manifests = render(VALUE_SETS["multi-model"])
    offering = {n for n, g in groups(manifests).items() if "mell_control" in g.get("resources", {})}
    assert offering == {"ingress"}
    head = rayservice(manifests)["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["resources"] == {"CPU": "0", "mell_control": "1000"}


def test_secrets_are_referred_to_and_nowhere_copied() -> None:
    manifests = render(VALUE_SETS["multi-model"])
    for template in pod_templates(manifests).values():
        reference = {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
        assert env(template)["HF_TOKEN"] == reference
    service = rayservice(manifests)
    assert "HF_TOKEN" not in service["spec"]["serveConfigV2"]
    redis = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert redis["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "redis-password"}
    assert not of_kind(manifests, "Secret")


def test_api_keys_are_mounted_where_the_serve_config_looks_for_them() -> None:
    manifests = render(VALUE_SETS["multi-model"])
    config = yaml.safe_load(rayservice(manifests)["spec"]["serveConfigV2"])
    auth = config["applications"][0]["args"]["mell"]["auth"]
    (test_pod,) = of_kind(manifests, "Pod")
    for template in pod_templates(manifests).values():
        for keys in ("clients", "operators"):
            (path,) = auth[keys]["files"]
            assert mounted_secret(template, path) == f"{keys.removesuffix('s')}-keys"
    assert mounted_secret(test_pod, env(test_pod)["MELL_KEYS"]) == "client-keys"


def mounted_secret(template: Manifest, path: str) -> str:
    mounts = template["spec"]["containers"][0]["volumeMounts"]
    (mount,) = [m for m in mounts if m["mountPath"] == path]
    assert mount["readOnly"] is True
    (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mount["name"]]
    assert volume["secret"]["defaultMode"] == 0o440
    return volume["secret"]["secretName"]


@pytest.mark.parametrize(
    ("cache", "volume"),
    [
        ({"type": "emptyDir", "size": "5Gi"}, {"emptyDir": {"sizeLimit": "5Gi"}}),
        ({"type": "pvc"}, {"persistentVolumeClaim": {"claimName": "rel-mell-ray-models"}}),
        (
            {"type": "existingClaim", "existingClaim": "mine"},
            {"persistentVolumeClaim": {"claimName": "mine"}},
        ),
    ],
)
def test_model_cache(cache: dict[str, str], volume: dict[str, Any]) -> None:
    manifests = render({f"modelCache.{key}": value for key, value in cache.items()})
    for template in pod_templates(manifests).values():
        assert {"name": "models"} | volume in template["spec"]["volumes"]
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "models", "mountPath": "/models"} in mounts
        assert env(template)["HF_HOME"] == "/models"
    claims = of_kind(manifests, "PersistentVolumeClaim")
    assert len(claims) == (cache["type"] == "pvc")
    for claim in claims:
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_groups_environment_goes_before_everybodys_and_the_charts() -> None:
    manifests = render(
        {
            "env": [{"name": "A", "value": "all"}, {"name": "HF_HOME", "value": "/all"}],
            "workerGroups.gpu.env": [{"name": "A", "value": "group"}],
        }
    )
    templates = pod_templates(manifests)
    assert env(templates["gpu"])["A"] == "group"
    assert env(templates["head"])["A"] == "all"
    assert env(templates["head"])["HF_HOME"] == "/all"


def test_what_a_group_says_of_its_pods_is_there() -> None:
    pod = {
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "k", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
        ],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "initContainers": [{"name": "before", "image": "busybox"}],
    }
    values = {f"{where}.{k}": v for where in ("head", "workerDefaults") for k, v in pod.items()}
    sidecar = {"name": "beside", "image": "busybox"}
    manifests = render(
        values
        | {"head.sidecars": [sidecar], "workerGroups.gpu.sidecars": [sidecar]}
        | {"podLabels": {"team": "x"}, "podAnnotations": {"note": "y"}}
        | {"head.volumes": [{"name": "v", "emptyDir": {}}]}
        | {"head.volumeMounts": [{"name": "v", "mountPath": "/v"}]}
        | {"head.envFrom": [{"secretRef": {"name": "s"}}], "imagePullSecrets": [{"name": "pull"}]}
    )
    for name, template in pod_templates(manifests).items():
        spec = template["spec"]
        for key, value in pod.items():
            shown = spec[key][:1] if key == "tolerations" else spec[key]
            assert shown == value, f"{name}.{key}"
        assert [c["name"] for c in spec["containers"]][1:] == ["beside"]
        assert spec["imagePullSecrets"] == [{"name": "pull"}]
        assert template["metadata"]["labels"]["team"] == "x"
        assert template["metadata"]["annotations"] == {"note": "y"}
    head = pod_templates(manifests)["head"]["spec"]
    assert {"name": "v", "emptyDir": {}} in head["volumes"]
    assert head["containers"][0]["envFrom"] == [{"secretRef": {"name": "s"}}]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, "mell-ray:0.1.0-cuda"),
        ({"variant": "cpu"}, "mell-ray:0.1.0-cpu"),
        ({"tag": "7"}, "mell-ray:7"),
        ({"digest": "sha256:" + "a" * 64, "tag": "7"}, "mell-ray@sha256:" + "a" * 64),
    ],
)
def test_image(image: dict[str, str], expected: str) -> None:
    manifests = render({f"image.{key}": value for key, value in image.items()})
    images = {t["spec"]["containers"][0]["image"] for t in pod_templates(manifests).values()}
    assert images == {expected}


def test_a_group_may_have_an_image_of_its_own() -> None:
    templates = pod_templates(render({"head.image": {"variant": "cpu"}}))
    assert templates["head"]["spec"]["containers"][0]["image"] == "mell-ray:0.1.0-cpu"
    assert templates["gpu"]["spec"]["containers"][0]["image"] == "mell-ray:0.1.0-cuda"


def test_an_existing_service_account_is_used_and_none_made() -> None:
    manifests = render({"serviceAccount.create": False, "serviceAccount.name": "theirs"})
    assert not of_kind(manifests, "ServiceAccount")
    assert not of_kind(manifests, "Role")
    assert pod_templates(manifests)["head"]["spec"]["serviceAccountName"] == "theirs"


def test_network_policy_lets_in_whom_it_names() -> None:
    (policy,) = of_kind(render(VALUE_SETS["multi-model"]), "NetworkPolicy")
    api = [r for r in policy["spec"]["ingress"] if r.get("ports") == [{"port": 8000}]]
    (rule,) = api
    assert rule["from"][0]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "ingress"
    }
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert {"ports": [{"port": 443}, {"port": 6379}]} in policy["spec"]["egress"]
    assert not of_kind(render({"networkPolicy.enabled": False}), "NetworkPolicy")


def test_budgets_protect_the_pods_they_name() -> None:
    manifests = render(VALUE_SETS["multi-model"])
    labels = [{**template["metadata"]["labels"]} for template in pod_templates(manifests).values()]
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert len(budgets) == 2
    for budget in budgets:
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels)


def test_prometheus_annotations() -> None:
    for template in pod_templates(render({"metrics.podAnnotations": True})).values():
        assert template["metadata"]["annotations"]["prometheus.io/port"] == "8080"


def test_value_sets_are_packed_with_no_chart() -> None:
    """They are examples beside it."""
    assert "ci/" in (Path(str(VALUE_SETS["cpu-only"])).parents[1] / ".helmignore").read_text()
