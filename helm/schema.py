"""The JSON schema of the chart's values: strict, and with mell-ray's own schema for its settings.

What KubeRay's operator would refuse is refused here where a schema can say it, and in
`templates/_validate.tpl` where it cannot (comparisons of two values).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from mell_ray.config import LLMConfig, MellSettings

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANYTHING: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {
    "type": ["string", "integer", "number"],
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
# What becomes a DNS name and a label's value once capitals, dots and underscores are replaced.
NAME: Schema = {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?)?$"}
DNS_LABEL = "^[a-z]([-a-z0-9]*[a-z0-9])?$"

# KubeRay sets these itself, and refuses pods that do.
KUBERAY_ENV = [
    "RAY_enable_autoscaler_v2",
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "REDIS_USERNAME",
    "KUBERAY_GEN_AUTOSCALER_START_CMD",
]


def obj(properties: dict[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if required:
        schema["required"] = list(required)
    return schema | more


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


def enum(*values: str) -> Schema:
    return {"enum": list(values)}


def nonempty(**more: Any) -> Schema:
    return {"type": "string", "minLength": 1} | more


# A reference to a Secret; empty means none, and half of one is an error.
SECRET = obj(
    {"name": TEXT, "key": nonempty()},
    anyOf=[
        {"maxProperties": 0},
        {"required": ["name"], "properties": {"name": nonempty()}},
    ],
)

ENV = array(
    obj(
        {
            "name": nonempty(**{"not": {"enum": KUBERAY_ENV}}),
            "value": TEXT,
            "valueFrom": obj(
                dict.fromkeys(
                    ("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef"), ANYTHING
                ),
                minProperties=1,
                maxProperties=1,
            ),
        },
        ("name",),
    )
)
ENV_FROM = array(
    obj({"prefix": TEXT, "secretRef": ANYTHING, "configMapRef": ANYTHING}, minProperties=1)
)
TOLERATIONS = array(
    obj(
        {
            "key": TEXT,
            "operator": enum("Exists", "Equal"),
            "value": TEXT,
            "effect": enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
            "tolerationSeconds": {"type": "integer"},
        }
    )
)
RESOURCES = obj(
    {
        "requests": {"type": "object", "additionalProperties": QUANTITY},
        "limits": {"type": "object", "additionalProperties": QUANTITY},
        "claims": array(obj({"name": TEXT, "request": TEXT}, ("name",))),
    }
)
NAMED = array({"type": "object", "required": ["name"]})
IMAGE = obj(
    {
        "repository": nonempty(),
        "variant": enum("cuda", "cpu"),
        "tag": {"type": "string", "pattern": r"^[\w.-]{0,128}$"},
        "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
        "pullPolicy": enum("Always", "IfNotPresent", "Never"),
    }
)
# Ray wants strings, and KubeRay takes resources from one place only.
RAY_START_PARAMS = {
    "type": "object",
    "additionalProperties": TEXT,
    "propertyNames": {
        "not": {
            "enum": [
                *("num-cpus", "num-gpus", "memory", "resources", "labels"),
                *("redis-password", "redis-username"),
            ]
        }
    },
}
RAY_RESOURCES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
}

POD: dict[str, Schema] = {
    "image": IMAGE,
    "rayResources": RAY_RESOURCES,
    "rayStartParams": RAY_START_PARAMS,
    "resources": RESOURCES,
    "env": ENV,
    "envFrom": ENV_FROM,
    "volumes": NAMED,
    "volumeMounts": array({"type": "object", "required": ["name", "mountPath"]}),
    "initContainers": NAMED,
    "sidecars": NAMED,
    "podLabels": TEXTS,
    "podAnnotations": TEXTS,
    "nodeSelector": TEXTS,
    "tolerations": TOLERATIONS,
    "affinity": obj(dict.fromkeys(("nodeAffinity", "podAffinity", "podAntiAffinity"), ANYTHING)),
    "topologySpreadConstraints": array(
        {"type": "object", "required": ["maxSkew", "topologyKey", "whenUnsatisfiable"]}
    ),
    "priorityClassName": TEXT,
    "runtimeClassName": TEXT,
}
GROUP: dict[str, Schema] = POD | {
    "replicas": COUNT,
    "minReplicas": COUNT,
    "maxReplicas": {"type": "integer", "minimum": 1},
    "idleTimeoutSeconds": COUNT,
    "priority": {"type": "integer"},
    "gpusPerPod": COUNT,
    "gpuResource": nonempty(),
    "acceleratorType": TEXT,
    "drainSeconds": COUNT,
}
HEAD = POD | {
    "preStopSeconds": COUNT,
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 1},
}
BUDGET = {"enabled": FLAG, "minAvailable": {"type": "integer", "minimum": 1}}
PEERS = array(obj({"podSelector": ANYTHING, "namespaceSelector": ANYTHING, "ipBlock": ANYTHING}))
# Sections that the templates look into: with null, helm would remove them from the values.
SECTIONS = (
    *("image", "serve", "head", "workerDefaults", "workerGroups", "autoscaler", "rayAuth"),
    *("gcsFaultTolerance", "upgrade", "modelCache", "apiKeys", "huggingFace", "serviceAccount"),
    *("podDisruptionBudget", "networkPolicy", "ingress", "httpRoute", "metrics", "tests"),
)


def values_schema() -> Schema:
    definitions: dict[str, Schema] = {}
    top = obj(
        {
            "global": ANYTHING,
            "nameOverride": NAME,
            "fullnameOverride": NAME,
            "commonLabels": TEXTS,
            "commonAnnotations": TEXTS,
            "image": IMAGE,
            "imagePullSecrets": array(obj({"name": nonempty()}, ("name",))),
            "rayVersion": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+"},
            "serve": _serve(definitions),
            "env": ENV,
            "envFrom": ENV_FROM,
            "volumes": POD["volumes"],
            "volumeMounts": POD["volumeMounts"],
            "podLabels": TEXTS,
            "podAnnotations": TEXTS,
            "head": obj(HEAD),
            "workerDefaults": obj(GROUP),
            "workerGroups": {
                "type": "object",
                "propertyNames": {"pattern": DNS_LABEL, "maxLength": 40},
                "additionalProperties": obj(GROUP | {"enabled": FLAG})
                | {"type": ["object", "null"]},
            },
            **_ray(),
            **_storage(),
            **_access(),
            "metrics": _metrics(),
            "tests": obj({"enabled": FLAG, "timeoutSeconds": {"type": "integer", "minimum": 1}}),
            "extraObjects": array({"type": ["object", "string"]}),
        },
        SECTIONS,
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the mell-ray chart",
        **top,
        "definitions": definitions,
    }


def _serve(definitions: dict[str, Schema]) -> Schema:
    return obj(
        {
            "appName": nonempty(),
            "routePrefix": {"type": "string", "pattern": "^/"},
            "proxyLocation": enum("EveryNode", "HeadOnly"),
            "logLevel": enum("DEBUG", "INFO", "WARNING", "ERROR"),
            "accessLog": FLAG,
            "haproxy": FLAG,
            "models": array(_of_config(LLMConfig, definitions), minItems=1),
            "mell": _of_config(MellSettings, definitions),
        },
        ("models", "mell"),
    )


def _of_config(model: type[BaseModel], definitions: dict[str, Schema]) -> Schema:
    """mell-ray's own schema of a section; what it refers to goes into ``definitions``."""
    schema = model.model_json_schema(ref_template="#/definitions/{model}")
    definitions.update(schema.pop("$defs", {}))
    return schema


def _ray() -> dict[str, Schema]:
    return {
        "autoscaler": obj(
            {
                "enabled": FLAG,
                "version": enum("v1", "v2"),
                "upscalingMode": enum("Default", "Aggressive", "Conservative"),
                "idleTimeoutSeconds": COUNT,
                "resources": RESOURCES,
            }
        ),
        "rayAuth": obj({"mode": enum("token", "disabled"), "secretName": TEXT}),
        "gcsFaultTolerance": obj(
            {
                "enabled": FLAG,
                "redisAddress": TEXT,
                "passwordSecret": SECRET,
                "externalStorageNamespace": TEXT,
            }
        ),
        "upgrade": obj(
            {
                "type": enum("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
                "maxSurgePercent": COUNT | {"maximum": 100},
                "stepSizePercent": COUNT | {"maximum": 100},
                "intervalSeconds": {"type": "integer", "minimum": 1},
                "gatewayClassName": TEXT,
                "deletionDelaySeconds": COUNT,
            }
        ),
        "initializingTimeout": {"anyOf": [{"const": ""}, DURATION]},
    }


def _storage() -> dict[str, Schema]:
    modes = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
    return {
        "modelCache": obj(
            {
                "type": enum("emptyDir", "pvc", "existingClaim"),
                "mountPath": {"type": "string", "pattern": "^/."},
                "existingClaim": TEXT,
                "size": QUANTITY,
                "accessModes": array(enum(*modes), minItems=1),
                "storageClassName": TEXT,
                "keep": FLAG,
            }
        ),
        "apiKeys": obj({"clientsSecret": TEXT, "operatorsSecret": TEXT}),
        "huggingFace": obj({"tokenSecret": SECRET, "offline": FLAG}),
    }


def _access() -> dict[str, Schema]:
    host = obj(
        {
            "host": nonempty(),
            "paths": array(
                obj(
                    {
                        "path": {"type": "string", "pattern": "^/"},
                        "pathType": enum("Prefix", "Exact", "ImplementationSpecific"),
                    },
                    ("path",),
                )
            ),
        },
        ("host",),
    )
    return {
        "serviceAccount": obj({"create": FLAG, "name": TEXT, "annotations": TEXTS}),
        "podSecurityContext": ANYTHING,
        "containerSecurityContext": ANYTHING,
        "podDisruptionBudget": obj(
            {"head": obj(BUDGET), "workers": obj(BUDGET)}, ("head", "workers")
        ),
        "networkPolicy": obj(
            {
                "enabled": FLAG,
                "apiFrom": PEERS,
                "metricsFrom": PEERS,
                "operatorFrom": PEERS | {"minItems": 1},
                "extraIngress": array(obj({"from": PEERS, "ports": array(ANYTHING)})),
                "egress": obj(
                    {
                        "enabled": FLAG,
                        "rules": array(obj({"to": PEERS, "ports": array(ANYTHING)})),
                    }
                ),
            },
            ("egress",),
        ),
        "ingress": obj(
            {
                "enabled": FLAG,
                "className": TEXT,
                "annotations": TEXTS,
                "hosts": array(host),
                "tls": array(obj({"hosts": array(TEXT), "secretName": TEXT})),
            }
        ),
        "httpRoute": obj(
            {
                "enabled": FLAG,
                "annotations": TEXTS,
                "parentRefs": array({"type": "object", "required": ["name"]}),
                "hostnames": array(TEXT),
                "pathPrefix": {"type": "string", "pattern": "^/"},
                "requestTimeout": {"anyOf": [{"const": ""}, DURATION]},
            }
        ),
    }


def _metrics() -> Schema:
    return obj(
        {
            "podAnnotations": FLAG,
            "podMonitor": obj(
                {
                    "enabled": FLAG,
                    "interval": DURATION,
                    "scrapeTimeout": DURATION,
                    "labels": TEXTS,
                    "relabelings": array(ANYTHING),
                    "metricRelabelings": array(ANYTHING),
                }
            ),
            "prometheusRule": obj({"enabled": FLAG, "labels": TEXTS}),
            "dashboards": obj({"enabled": FLAG, "labels": TEXTS, "annotations": TEXTS}),
        },
        ("podMonitor", "prometheusRule", "dashboards"),
    )
