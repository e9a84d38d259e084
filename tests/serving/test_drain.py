"""A node is left: its replicas are emptied, and none is put there until that is taken back."""

from __future__ import annotations

import json
import threading

import pytest

from mell_ray.builtin import MODEL_ID
from mell_ray.serving import cli
from tests.serving.conftest import TIMEOUT_S, App


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("leave", replicas=(1, 2))


def node_of(app: App) -> dict:
    (node,) = app.state()["nodes"]
    return node


def complete(app: App, length: int) -> str:
    return (
        app.client.completions.create(
            model=MODEL_ID,
            prompt="It was a truth",
            max_tokens=length,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        .choices[0]
        .text
    )


def test_drained_node_gets_nothing_new_and_harms_nothing_old(app: App, capsys) -> None:
    """The only node of the cluster: what runs there cannot move, so it runs on to its end."""
    (old,) = app.wait_ready(1)
    expected = complete(app, 400)
    texts: list[str] = []
    running = threading.Thread(target=lambda: texts.append(complete(app, 400)))
    running.start()
    app.wait(lambda s: s["requests"] or not running.is_alive(), "the request does not run")
    node = node_of(app)
    assert node["state"] == "ready"
    cli.drain(node["address"], app.url, undo=False, wait_s=TIMEOUT_S)
    assert "drained after" in capsys.readouterr().out
    running.join()
    assert texts == [expected]

    left = app.wait(
        lambda s: [n for n in s["nodes"] if n["state"] == "drained"], "the node is not empty"
    )
    assert [n["drained_by"] for n in left] == ["operator"]
    (starting,) = app.wait(
        lambda s: [r for r in s["replicas"] if r["state"] == "starting"], "nothing comes instead"
    )
    assert starting["id"] != old
    later = threading.Thread(target=lambda: texts.append(complete(app, 400)))
    later.start()
    app.wait(lambda s: s["queued"], "the new request found a place on the drained node")
    cli.drain(node["id"], app.url, undo=True, wait_s=0.0)
    later.join()
    assert texts == [expected, expected]
    assert node_of(app)["state"] == "ready"


def test_wrong_calls_are_refused(app: App) -> None:
    assert app.post("nodes/nowhere/drain").status_code == 404
    answer = app.post(f"nodes/{node_of(app)['id']}/drain", {"drained": "yes"})
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["param"] == "drained"
