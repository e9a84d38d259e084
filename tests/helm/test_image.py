"""The Dockerfile cannot be built without a container runtime; what can be checked of it is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import yaml

from tests.helm.support import CHART, ROOT

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", TEXT).splitlines()
COPIED = [
    source
    for line in LINES
    if line.startswith("COPY ") and "--from" not in line
    for source in line.split()[1:-1]
]


def stages() -> dict[str, str]:
    """Name of each stage and what it is built from."""
    return {m[2]: m[1] for line in LINES if (m := re.match(r"FROM (\S+) AS (\S+)", line))}


def values() -> dict:
    return yaml.safe_load((CHART / "values.yaml").read_text())


def test_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_what_is_copied_is_there_and_not_ignored() -> None:
    assert COPIED
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for source in COPIED:
        assert (ROOT / source).exists(), source
        ignored = False
        for pattern in patterns:  # the last one that matches it, or a folder above it, decides
            path = Path(source)
            if any(fnmatch(str(p), pattern.lstrip("!")) for p in [path, *path.parents][:-1]):
                ignored = not pattern.startswith("!")
        assert not ignored, source


def test_the_package_can_be_built_from_what_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [project["project"]["readme"], *project["project"]["license-files"]]
    wanted += project["tool"]["setuptools"]["package-dir"].values()
    extensions = project["tool"]["setuptools"]["ext-modules"]
    wanted += {str(Path(file).parent) for each in extensions for file in each["sources"]}
    assert set(wanted) <= set(COPIED)
    for extra in re.findall(r"\.\[([\w-]+)\]", TEXT):
        assert extra in project["project"]["optional-dependencies"]


def test_kernels_are_compiled_where_no_image_comes_from() -> None:
    """What runs on a CPU needs no compiler. Triton does, for C."""
    install = re.compile(r"apt-get install .*g\+\+")
    with_compiler = {part.split("\n")[0] for part in TEXT.split(" AS ") if install.search(part)}
    assert with_compiler == {"build-cpu"}


def test_targets_are_the_charts_variants() -> None:
    assert {"cpu", "cuda"} <= set(stages())
    schema = (CHART / "values.schema.json").read_text()
    for variant in ("cpu", "cuda"):
        assert f'"{variant}"' in schema
    for target in ("cpu", "cuda"):
        assert stages()[target] == "runtime"
        after = TEXT.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert f"COPY --from=build-{target} /opt/mell /opt/mell" in after


def test_the_user_is_the_charts() -> None:
    context = values()["podSecurityContext"]
    user = f"{context['runAsUser']}:{context['runAsGroup']}"
    users = [line.split()[1] for line in LINES if line.startswith("USER ")]
    assert users == [user, user]


def test_kuberays_probes_find_their_tools() -> None:
    runtime = TEXT.split(" AS runtime\n")[1].split("\nFROM ")[0]
    assert re.search(r"apt-get install .*\bbash\b.*\bwget\b", runtime)


def test_ray_is_the_version_that_the_chart_names() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)$", constraints, re.M)
    assert values()["rayVersion"] == ray
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["annotations"]["mell-ray/ray"] == ray
    assert "PIP_CONSTRAINT=/src/constraints.txt" in TEXT


def test_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert f"ARG VERSION={project['version']}" in TEXT
