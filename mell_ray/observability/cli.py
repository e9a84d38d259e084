"""``mell-ray dashboards``: the Grafana dashboard and the alert rules."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from mell_ray.errors import ConfigError


class Artifact(StrEnum):
    """What ``export`` prints."""

    DASHBOARD = "dashboard"
    ALERTS = "alerts"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    group = typer.Typer(no_args_is_help=True, help="The Grafana dashboard and the alert rules.")
    group.command()(push)
    group.command()(export)
    app.add_typer(group, name="dashboards")


def push(
    url: Annotated[str, typer.Option(envvar="GRAFANA_URL", help="Address of Grafana.")],
    folder: Annotated[str, typer.Option(help="Folder; created where it is missing.")] = "mell-ray",
    datasource: Annotated[
        str | None,
        typer.Option(help="Name of a Prometheus data source. Default: Grafana's default one."),
    ] = None,
    prometheus_url: Annotated[
        str | None,
        typer.Option(help="Create the data source with this address where it is missing."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done and do nothing.")] = False,
    force: Annotated[bool, typer.Option(help="Replace what was changed by hand.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For each call to Grafana.")] = 10.0,
) -> None:
    """Create or update the dashboard in Grafana. The token comes from GRAFANA_TOKEN."""
    from mell_ray.observability import push as pushing
    from mell_ray.observability.grafana import Grafana

    token = os.environ.get("GRAFANA_TOKEN")
    if not token:
        raise ConfigError(
            "GRAFANA_TOKEN: set it to a Grafana service account token with the role Editor"
        )
    if prometheus_url is not None and datasource is None:
        raise ConfigError("--prometheus-url: name the data source with --datasource, too")
    wish = pushing.Wish(folder, datasource, prometheus_url, force, dry_run)
    for line in pushing.push(Grafana(url, token, timeout_s), wish):
        typer.echo(line)


def export(
    what: Annotated[Artifact, typer.Argument(help="Which of the two.")],
) -> None:
    """Print the dashboard (JSON, to import) or the Prometheus alert rules (YAML)."""
    from mell_ray.observability import alerts, dashboard

    typer.echo((dashboard if what is Artifact.DASHBOARD else alerts).text(), nl=False)
