"""Names fit into what Kubernetes and KubeRay allow, and two releases never share one."""

from __future__ import annotations

import re

import pytest

from tests.helm.support import VALUE_SETS, Manifest, of_kind, pod_templates, rayservice, render

LONG = "a" * 52  # helm allows 53
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
ALL = VALUE_SETS["node-8gpu"]


def labels(manifests: list[Manifest]) -> list[dict[str, str]]:
    metadata = [m["metadata"] for m in [*manifests, *pod_templates(manifests).values()]]
    return [m.get("labels", {}) for m in metadata]


@pytest.mark.parametrize("release", ["rel", "a", "mell-ray", "my.release", "7up", LONG + "x"])
@pytest.mark.parametrize("values", ["multi-model", "node-8gpu"])
def test_names_and_labels_are_valid(release: str, values: str) -> None:
    manifests = render(VALUE_SETS[values], release=release)
    name = rayservice(manifests)["metadata"]["name"]
    assert DNS_1035.fullmatch(name)
    assert len(name) <= 47  # KubeRay derives longer ones from it
    for manifest in manifests:
        assert len(manifest["metadata"]["name"]) <= 63
    for pairs in labels(manifests):
        for value in pairs.values():
            assert len(value) <= 63
            assert LABEL_VALUE.fullmatch(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        (LONG + "x", LONG + "y"),
        ("a.b", "a-b"),
        ("x", "x-mell-ray"),
        ("7up", "m-7up"),
        ("mell-ray", "mell"),
    ],
)
def test_two_releases_share_neither_names_nor_pods(one: str, other: str) -> None:
    def identity(release: str) -> set[tuple[str, str]]:
        return {(m["kind"], m["metadata"]["name"]) for m in render(ALL, release=release)}

    assert not identity(one) & identity(other)
    mine, theirs = render(ALL, release=one), render(ALL, release=other)
    (policy,) = of_kind(mine, "NetworkPolicy")
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(wanted <= t["metadata"]["labels"].items() for t in pod_templates(mine).values())
    for template in pod_templates(theirs).values():
        assert not wanted <= template["metadata"]["labels"].items()


def test_one_release_has_no_name_twice() -> None:
    for path in VALUE_SETS.values():
        identity = [(m["kind"], m["metadata"]["name"]) for m in render(path)]
        assert len(identity) == len(set(identity))


def test_names_may_be_replaced() -> None:
    assert rayservice(render({"fullnameOverride": "mine"}))["metadata"]["name"] == "mine"
    assert rayservice(render({"nameOverride": "llm"}))["metadata"]["name"] == "rel-llm"


def test_common_labels_reach_every_object_and_no_pod() -> None:
    manifests = render({"commonLabels": {"team": "x"}, "commonAnnotations": {"note": "y"}})
    for manifest in manifests:
        assert manifest["metadata"]["labels"]["team"] == "x"
        assert manifest["metadata"]["annotations"]["note"] == "y"
    for template in pod_templates(manifests).values():
        assert "team" not in template["metadata"]["labels"]


@pytest.mark.parametrize("name", ["My_Name", "Team.App_v2", "7"])
def test_given_names_are_made_fit(name: str) -> None:
    manifests = render({"fullnameOverride": name, "nameOverride": name})
    assert DNS_1035.fullmatch(rayservice(manifests)["metadata"]["name"])
    assert all(LABEL_VALUE.fullmatch(v) for pairs in labels(manifests) for v in pairs.values())
