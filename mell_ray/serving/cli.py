"""``mell-ray serve``, ``status``, ``evacuate`` and ``drain``."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from pydantic import BaseModel, ValidationError

from mell_ray.errors import ConfigError, MellError

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_S = 0.5
KEY_VARIABLE = "MELL_API_KEY"

UrlOption = Annotated[str, typer.Option(help="Address of the server.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(serve)
    app.command()(status)
    app.command()(evacuate)
    app.command()(drain)


def serve(
    config: Annotated[
        Path | None,
        typer.Argument(help="Serve config file. Default: the built-in model on CPU."),
    ] = None,
    haproxy: Annotated[
        bool, typer.Option(help="Use Ray Serve's HAProxy mode, which costs a quarter per token.")
    ] = True,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use. Default: start one on this machine.")
    ] = None,
    cpu_slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU replicas that run on this machine at once. Default: as many as the config "
            "may open.",
        ),
    ] = None,
) -> None:
    """Serve the models of a config file and say how to use them. Ctrl-C stops everything."""
    path = config or Path(str(resources.files("mell_ray").joinpath("builtin/local.yaml")))
    settings = _read_config(path)
    _check_port(settings)
    command = [_script("serve"), "run", str(path)]
    if address is not None:
        command += ["--address", address]
    with tempfile.TemporaryDirectory(prefix="mell-") as scratch:
        # A session of its own: Ctrl-C reaches only this process, which then stops Ray in order.
        child = subprocess.Popen(
            command,
            env=ray_environment(settings, haproxy, scratch, cpu_slots),
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            _announce(child, settings)
            code = child.wait()
        except KeyboardInterrupt:
            code = _stop(child)
        finally:
            _end_leftovers(scratch)
    raise typer.Exit(code)


def status(
    url: UrlOption = DEFAULT_URL,
    once: Annotated[bool, typer.Option(help="Print the table once instead of live.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state as JSON.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Refresh period.")] = 0.5,
) -> None:
    """Live table of replicas and requests."""
    from rich.console import Console
    from rich.live import Live

    from mell_ray.serving.status_table import render

    if as_json:
        typer.echo(json.dumps(_call(url, "/mell/v1/state"), indent=2))
        return
    console = Console()
    if once or not console.is_terminal:
        console.print(render(_call(url, "/mell/v1/state")))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            while True:
                live.update(render(_call(url, "/mell/v1/state")), refresh=True)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return


def evacuate(
    replica: Annotated[str, typer.Argument(help="Replica id, as `mell-ray status` shows it.")],
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Empty a replica by migrating its requests, then release it."""
    answer = _call(url, f"/mell/v1/replicas/{replica}/evacuate", method="POST")
    typer.echo(f"{answer['id']}: {answer['state']}, {answer['running']} requests to move")


def drain(
    node: Annotated[str, typer.Argument(help="Ray id of a node, or its address.")],
    url: UrlOption = DEFAULT_URL,
    undo: Annotated[bool, typer.Option(help="Let the node have replicas again.")] = False,
    wait_s: Annotated[
        float, typer.Option(min=0, help="Wait that long for the node to be empty, else fail.")
    ] = 0.0,
) -> None:
    """Empty all replicas of a node by migration, as fast as possible, and put none there again."""
    started = time.monotonic()
    path = f"/mell/v1/nodes/{node}/drain"
    answer = _call(url, path, method="POST", body={"drained": not undo})
    if undo:
        typer.echo(f"{node}: takes replicas again")
        return
    names = {view["id"] for view in answer["nodes"]}
    left = sum(len(view["replicas"]) for view in answer["nodes"])
    typer.echo(f"{node}: {left} replicas to empty")
    while left and time.monotonic() - started < wait_s:
        time.sleep(POLL_S / 5)
        nodes = _call(url, "/mell/v1/state")["nodes"]
        left = sum(len(view["replicas"]) for view in nodes if view["id"] in names)
        if not left:
            typer.echo(f"{node}: drained after {time.monotonic() - started:.1f} s")
    if left and wait_s:
        raise MellError(f"{node}: {left} replicas are not empty after {wait_s:g} s")


# --- helpers -------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    """Parse and check a Serve config as far as it is ours, before anything starts."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    from mell_ray.config import MellConfig
    from mell_ray.config_errors import describe
    from mell_ray.serving.checks import check_config

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid YAML: not in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict) or not settings.get("applications"):
        raise ConfigError(f"{path}: applications: a Serve config needs a list of applications")
    try:
        ServeDeploySchema.model_validate(settings)
        _refuse_unknown(settings, ServeDeploySchema, f"{path}: ")
        for number, application in enumerate(settings["applications"]):
            where = f"{path}: applications.{number}."
            _refuse_unknown(application, ServeApplicationSchema, where)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(ServeDeploySchema, error)}") from None
    for number, application in enumerate(settings["applications"]):
        if str(application["import_path"]).startswith("mell_ray."):
            try:
                check_config(MellConfig.parse(application.get("args") or {}))
            except ConfigError as error:
                where = f"{path}: applications.{number}.args"
                raise ConfigError(f"{where}: {error.message}") from None
    return settings


def _refuse_unknown(settings: dict[str, Any], schema: type[BaseModel], where: str) -> None:
    """Serve itself ignores what it does not know."""
    for name in settings:
        if name not in schema.model_fields:
            meant = difflib.get_close_matches(name, schema.model_fields, n=1)
            advice = f"; did you mean {meant[0]!r}?" if meant else ""
            raise ConfigError(f"{where}{name}: unknown setting{advice}")


def ray_environment(
    settings: dict[str, Any], haproxy: bool, scratch: str, cpu_slots: int | None = None
) -> dict[str, str]:
    """Ray reads these when it starts; what the user has set stays."""
    wanted = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",  # its files under /tmp/ray keep everything
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S": "1",  # a dead Migrator is soon replaced
        "RAY_OVERRIDE_RESOURCES": json.dumps({"mell_cpu": cpu_slots or _cpu_slots(settings)}),
    }
    if haproxy:
        wanted |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{scratch}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{scratch}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": scratch,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{scratch}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{scratch}/metrics.sock",
        }
    return {**wanted, **os.environ}


def _endpoint(settings: dict[str, Any]) -> tuple[str, int]:
    """Where the server will listen."""
    http = settings.get("http_options") or {}
    return str(http.get("host", "127.0.0.1")), int(http.get("port", 8000))


def _check_port(settings: dict[str, Any]) -> None:
    host, port = _endpoint(settings)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"http_options.port: {host}:{port} cannot be used ({error.strerror}); "
                "stop what listens there or choose another port"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_leftovers(scratch: str) -> None:
    """HAProxy outlives a Ray that was killed, and would keep the port."""
    for process in psutil.process_iter(["cmdline"]):
        if any(scratch in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _cpu_slots(settings: dict[str, Any]) -> int:
    """One slot for each CPU replica that the config may open, and one for a replica that takes the
    place of another."""
    slots = 0
    for application in settings["applications"]:
        for llm in (application.get("args") or {}).get("llm_configs", []):
            scaling = (llm.get("deployment_config") or {}).get("autoscaling_config") or {}
            slots += int(scaling.get("max_replicas", 1)) + 1
    return slots


def _script(name: str) -> str:
    """A console script of this environment, whether or not it is on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _announce(child: subprocess.Popen[bytes], settings: dict[str, Any]) -> None:
    """Wait until the server answers, then print what to do next."""
    host, port = _endpoint(settings)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    while child.poll() is None:
        try:
            models = _call(url, "/v1/models")["data"]
        except MellError as error:
            if error.code == "401":
                typer.echo(
                    f"\nmell-ray serves at {url}/v1, with the API keys of its configuration. "
                    f"Put one into {KEY_VARIABLE} for `mell-ray status`."
                )
                return
            time.sleep(POLL_S)
            continue
        typer.echo(_next_steps(url, models[0]["id"]))
        return


def _next_steps(url: str, model: str) -> str:
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Tell me of Emma."}]}
    )
    return f"""
mell-ray serves {model} at {url}/v1. Try it in another terminal:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{body}'

or with the openai package:

  python - <<'EOF'
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  stream = client.chat.completions.create(
      model="{model}", stream=True,
      messages=[{{"role": "user", "content": "Tell me of Emma."}}],
  )
  for chunk in stream:
      print(chunk.choices[0].delta.content or "", end="", flush=True)
  EOF

`mell-ray status` shows replicas and requests live. Ctrl-C stops the server.
"""


def _heed_interrupts() -> None:
    """In the child: a shell may have started us with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt


def _stop(child: subprocess.Popen[bytes]) -> int:
    """Let `serve run` shut Serve and Ray down; a second interrupt, or a minute, ends it at once."""
    typer.echo("Stopping; this takes some seconds.")
    child.send_signal(signal.SIGINT)
    try:
        child.wait(timeout=60)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return 0


def _call(url: str, path: str, method: str = "GET", body: Any = None) -> Any:
    """One operator call, with the key in ``MELL_API_KEY`` where there is one.

    Raises:
        MellError: nobody answers, or the server's own message.
    """
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r}: not an http:// or https:// address")
    request = urllib.request.Request(url.rstrip("/") + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {error.code}"
        raise MellError(f"{url}{path}: {message}", code=str(error.code)) from None
    except (OSError, ValueError, HTTPException) as error:
        raise MellError(f"no mell-ray server answers at {url} ({error})") from None
