"""Renders the chart with the real helm, and validates what comes out as an API server would."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "mell-ray"
HELM = Path(sys.executable).with_name("helm")
VALUE_SETS: dict[str, Path | None] = {"default": None} | {
    path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))
}
# The oldest Kubernetes that the chart allows and the newest one the schemas are there for.
KUBERNETES = ("1.27", "1.37")
CRDS = Path(os.environ.get("MELL_CRDS", ROOT.parent / "shared" / "crds"))

Manifest = dict[str, Any]


class HelmError(Exception):
    """helm refused; the message is its own."""


class StrictLoader(yaml.CSafeLoader):
    """YAML in which a key may stand once, as Kubernetes' strict decoding wants it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def helm(*arguments: str | Path) -> str:
    result = subprocess.run(
        [str(HELM), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise HelmError(result.stderr + result.stdout)
    return result.stdout


def render(
    values: dict[str, Any] | Path | None = None,
    *,
    release: str = "rel",
    chart: Path = CHART,
    options: tuple[str, ...] = (),
) -> list[Manifest]:
    """The objects of a release, hooks included."""
    arguments: list[str | Path] = ["template", release, chart, "--namespace", "space", *options]
    if isinstance(values, Path):
        arguments += ["--values", values]
    elif values is not None:
        # JSON on the command line: no file, and YAML is not in between.
        arguments += [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    documents = yaml.load_all(helm(*arguments), StrictLoader)
    return [document for document in documents if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] == kind]


def rayservice(manifests: list[Manifest]) -> Manifest:
    (service,) = of_kind(manifests, "RayService")
    return service


def groups(manifests: list[Manifest]) -> dict[str, Manifest]:
    specs = rayservice(manifests)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in specs}


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates of the head and of each worker group."""
    cluster = rayservice(manifests)["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]["template"]} | {
        name: group["template"] for name, group in groups(manifests).items()
    }


def validate(manifest: Manifest, kubernetes: str) -> None:
    """As an API server does with strict field validation.

    Raises:
        an exception of the validator, which names the field.
    """
    if manifest["apiVersion"].split("/")[0] in ("ray.io", "monitoring.coreos.com"):
        jsonschema.Draft202012Validator(crd_schema(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(copy.deepcopy(manifest), kubernetes, strict=True)


def as_pod(template: Manifest) -> Manifest:
    metadata = {"name": "pod"} | template["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@cache
def crd_schema(kind: str) -> dict[str, Any]:
    """The schema of a custom kind, strict: what a server would prune silently is an error."""
    for path in sorted(CRDS.glob("*.yaml")):
        crd = yaml.load(path.read_text(), yaml.CSafeLoader)
        if crd["spec"]["names"]["kind"] == kind:
            (version,) = [v for v in crd["spec"]["versions"] if v["storage"]]
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # the server's own business
            return schema
    raise LookupError(f"no CRD of kind {kind} in {CRDS}")


def strict(schema: Any) -> Any:
    """OpenAPI as the API server reads it, in JSON schema's terms."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {key: _convert(key, value) for key, value in schema.items()}
    if "properties" in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            converted.setdefault("additionalProperties", False)
        defaulted = {k for k, v in schema["properties"].items() if "default" in v}
        required = [k for k in schema.get("required", []) if k not in defaulted]
        converted.pop("required", None)
        if required:
            converted["required"] = required
    if schema.get("x-kubernetes-int-or-string"):
        converted["type"] = ["integer", "string"]
    return converted


def _convert(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: strict(item) for name, item in value.items()}
    if key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
        return strict(value)
    return value


def names(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        yield manifest["metadata"]["name"]
