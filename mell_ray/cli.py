"""The ``mell-ray`` command. Only a registry: each group of commands lives beside what it drives.

Modules registered here import nothing heavy at their top (no torch, no Ray, no matplotlib), so
that ``mell-ray --help`` is quick; a command imports what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mell_ray.bench import cli as bench
from mell_ray.errors import ConfigError, MellError
from mell_ray.observability import cli as observability
from mell_ray.replay import cli as replay
from mell_ray.serving import cli as serving
from mell_ray.simulation import cli as simulation


class _FriendlyGroup(TyperGroup):
    """Turns this package's errors into one line on stderr; anything else is a bug and shows."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MellError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(
    name="mell-ray",
    cls=_FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Serve large language models on as few GPUs as possible.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"mell-ray {version('mell-ray')}")
        except PackageNotFoundError:
            typer.echo("mell-ray (not installed: run from its source tree)")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


serving.register(app)
simulation.register(app)
bench.register(app)
observability.register(app)
replay.register(app)


def main() -> None:
    """Entry point of the ``mell-ray`` script."""
    app()
