"""Typing errors and what KubeRay's operator would refuse are refused by helm itself."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.support import VALUE_SETS, HelmError, pod_templates, render

INCREMENTAL = {
    "upgrade.type": "NewClusterWithIncrementalUpgrade",
    "upgrade.gatewayClassName": "gateway",
}
MODEL = {
    "model_loading_config": {"model_id": "m", "model_source": "org/m"},
    "accelerator_type": "GPU",
}


def model(**changes: Any) -> list[dict[str, Any]]:
    return [MODEL | changes]


WRONG: list[tuple[dict[str, Any], str]] = [
    # keys
    ({"hed": {}}, "hed"),
    ({"head.resuorces": {}}, "resuorces"),
    ({"workerGroups.gpu.minReplica": 1}, "minReplica"),
    ({"workerDefaults.gpus": 1}, "gpus"),
    ({"modelCache.sice": "1Gi"}, "sice"),
    ({"metrics.podMonitor.enable": True}, "enable"),
    ({"serve.polcy": {}}, "polcy"),
    ({"serve.mell.polcy": {}}, "polcy"),
    ({"serve.mell.policy": {"nam": "tide"}}, "nam"),
    ({"serve.mell.fleet": {"idle_grace": 1}}, "idle_grace"),
    ({"serve.models": model(engine_kwarg={})}, "engine_kwarg"),
    ({"serve.models": model(engine_kwargs={"max_seqs": 1})}, "max_seqs"),
    ({"head.tolerations": [{"key": "a", "effects": "NoSchedule"}]}, "effects"),
    ({"head.env": [{"name": "A", "valeu": "1"}]}, "valeu"),
    ({"head.env": [{"name": "A", "value": 1}]}, "value"),
    # types and ranges
    ({"workerGroups.gpu.minReplicas": "1"}, "minReplicas"),
    ({"workerGroups.gpu.minReplicas": -1}, "minReplicas"),
    ({"workerGroups.gpu.maxReplicas": 0}, "maxReplicas"),
    ({"workerGroups.GPU": {}}, "GPU"),
    ({"autoscaler.enabled": "yes"}, "autoscaler.enabled"),
    ({"serve.models": []}, "serve.models"),
    ({"serve.models": model(model_loading_config={})}, "model_id"),
    ({"serve.mell.epoch_s": 0}, "epoch_s"),
    ({"serve.mell.migration": {"mode": "teleport"}}, "mode"),
    ({"modelCache.size": "big"}, "modelCache.size"),
    ({"modelCache.type": "nfs"}, "modelCache.type"),
    ({"modelCache.accessModes": ["Many"]}, "accessModes"),
    ({"image.digest": "abc"}, "digest"),
    ({"image.variant": "rocm"}, "variant"),
    ({"metrics.podMonitor.interval": "often"}, "interval"),
    ({"rayVersion": "latest"}, "rayVersion"),
    # secrets that are half named
    ({"huggingFace.tokenSecret": {"key": "token"}}, "tokenSecret"),
    ({"huggingFace.tokenSecret": {"name": ""}}, "tokenSecret"),
    ({"huggingFace.tokenSecret": {"name": "s", "keys": "k"}}, "keys"),
    ({"gcsFaultTolerance.passwordSecret": {"key": "p"}}, "passwordSecret"),
    ({"apiKeys.clientSecret": "s"}, "clientSecret"),
    ({"apiKeys.clientsSecret": {"name": "s"}}, "clientsSecret"),
    ({"serve.mell.auth": {"clients": {"keys": ["secret"]}}}, "keys"),
    ({"serve.mell.ingress": {"max_body_bytes": 0}}, "max_body_bytes"),
    ({"imagePullSecrets": ["name"]}, "imagePullSecrets"),
    # what the operator refuses
    ({"workerGroups.gpu.minReplicas": 9}, r"minReplicas \(9\) exceeds maxReplicas \(4\)"),
    ({"workerGroups.gpu.replicas": 9}, r"replicas \(9\) is not between"),
    (
        {"autoscaler.version": "v1", "workerGroups.gpu.idleTimeoutSeconds": 5},
        "idleTimeoutSeconds: needs autoscaler",
    ),
    ({"autoscaler.enabled": False, "workerGroups.gpu.priority": 5}, "priority: needs autoscaler"),
    ({"autoscaler.version": "v3"}, "autoscaler.version"),
    ({"upgrade.type": "NewClusterr"}, "upgrade.type"),
    ({"upgrade.type": "NewClusterWithIncrementalUpgrade"}, "gatewayClassName"),
    (INCREMENTAL | {"autoscaler.enabled": False}, "needs autoscaler.enabled"),
    (INCREMENTAL | {"upgrade.stepSizePercent": 50, "upgrade.maxSurgePercent": 20}, "exceeds"),
    (INCREMENTAL | {"upgrade.intervalSeconds": 0}, "intervalSeconds"),
    (INCREMENTAL | {"ingress.enabled": True, "ingress.hosts": [{"host": "h"}]}, "its own Gateway"),
    ({"head.rayStartParams": {"num-cpus": "0"}}, "rayStartParams"),
    ({"head.rayStartParams": {"metrics-export-port": 8080}}, "metrics-export-port"),
    ({"workerDefaults.rayStartParams": {"labels": "a=b"}}, "rayStartParams"),
    ({"head.rayResources": {"mell_control": 1}}, "mell_control"),
    ({"head.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, "head.env"),
    ({"env": [{"name": "RAY_REDIS_ADDRESS", "value": "r:6379"}]}, "env"),
    ({"gcsFaultTolerance.enabled": True}, "redisAddress: is required"),
    ({"initializingTimeout": "soon"}, "initializingTimeout"),
    ({"rayAuth.mode": "password"}, "rayAuth.mode"),
    # what would wait for ever
    ({"serve.models": model(accelerator_type=None)}, "accelerator_type: say GPU"),
    ({"serve.models": model(accelerator_type="H100")}, "no worker group has a H100"),
    ({"workerGroups.gpu.enabled": False}, "no worker group has a GPU"),
    (
        {
            "serve.models": model(
                deployment_config={"autoscaling_config": {"min_replicas": 9, "max_replicas": 9}}
            )
        },
        "need 9 GPUs, the worker groups have at most 4",
    ),
    (
        {
            "serve.models": model(
                deployment_config={"autoscaling_config": {"min_replicas": 2, "max_replicas": 1}}
            )
        },
        r"min_replicas \(2\) exceeds max_replicas \(1\)",
    ),
    ({"serve.models": [MODEL, MODEL]}, "twice"),
    ({"serve.mell.control_resource": "nowhere"}, 'no pod offers "nowhere"'),
    (
        {
            "serve.models": model(accelerator_type="CPU"),
            "serve.mell.fleet": {"require_cpu_resource": True},
        },
        'no pod offers "mell_cpu"',
    ),
    ({"workerGroups.cpu": {"acceleratorType": "L4"}}, "the group has no GPU"),
    ({"workerGroups.gpu.resources.limits": {"nvidia.com/gpu": 1}}, "comes from gpusPerPod"),
    # sections that null would remove, and names that are none
    ({"metrics": None}, "metrics is required"),
    ({"serve.mell": None}, "serve: mell is required"),
    ({"workerDefaults": None}, "workerDefaults is required"),
    ({"nameOverride": "My App"}, "nameOverride"),
    ({"fullnameOverride": "app-"}, "fullnameOverride"),
    ({"head.terminationGracePeriodSeconds": 25}, "must exceed head.preStopSeconds"),
    ({"modelCache.type": "existingClaim"}, "name the claim"),
    ({"ingress.enabled": True}, "ingress.hosts"),
    ({"httpRoute.enabled": True}, "httpRoute.parentRefs"),
    ({"networkPolicy.operatorFrom": []}, "operatorFrom"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(next(iter(v))) for v, _ in WRONG])
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(values)


RIGHT: list[dict[str, Any]] = [
    {"global": {"anything": 1}},
    {"workerGroups.more": {"gpusPerPod": 2, "idleTimeoutSeconds": 5, "priority": 3}},
    INCREMENTAL,
    {"upgrade.type": "None"},
    {"initializingTimeout": "1h30m"},
    {"autoscaler.version": "v1"},
    {"rayAuth.mode": "disabled"},
    {"head.env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]},
    {"gcsFaultTolerance.enabled": True, "gcsFaultTolerance.redisAddress": "redis:6379"},
    # a key with nothing behind it, as a values file has it whose lines are commented out
    dict.fromkeys(("env", "envFrom", "volumes", "volumeMounts", "podLabels", "podAnnotations")),
    dict.fromkeys(("commonLabels", "commonAnnotations", "imagePullSecrets", "extraObjects")),
    dict.fromkeys(("head.resources", "head.nodeSelector", "workerGroups.gpu.resources")),
]


@pytest.mark.parametrize("values", RIGHT, ids=[str(next(iter(v))) for v in RIGHT])
def test_accepted(values: dict[str, Any]) -> None:
    assert render(values)


def test_null_removes_a_group() -> None:
    path = VALUE_SETS["cpu-only"]
    names = [
        group["groupName"]
        for m in render(path)
        if m["kind"] == "RayService"
        for group in m["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    ]
    assert names == ["cpu"]


def test_null_removes_a_security_context() -> None:
    manifests = render({"podSecurityContext": None, "containerSecurityContext": None})
    assert "securityContext" not in str(manifests)


def test_a_volume_of_the_user_takes_the_place_of_the_charts() -> None:
    values = {
        "volumes": [{"name": "tmp", "hostPath": {"path": "/fast"}}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp", "subPath": "ray"}],
    }
    for template in pod_templates(render(values)).values():
        volumes = template["spec"]["volumes"]
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert [v for v in volumes if v["name"] == "tmp"] == values["volumes"]
        assert [m for m in mounts if m["mountPath"] == "/tmp"] == values["volumeMounts"]
