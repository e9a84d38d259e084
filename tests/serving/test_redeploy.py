"""A new configuration reaches the replicas, one by one, under running requests."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from mell_ray.builtin import MODEL_ID, model_path
from tests.serving.conftest import App

# A lease that outlives the change of Routers, however busy the machine is.
MELL = {"ingress": {"drain_s": 60}, "fleet": {"replica_lease_s": 120}}
# Of different lengths, so that there is no moment in which all have ended.
LENGTHS = {"Chapter 1. It was": 150, "Chapter 2. She": 220, "Chapter 3. Mr.": 290}


def complete(app: App, prompt: str) -> str:
    answer = app.client.completions.create(
        model=MODEL_ID,
        prompt=prompt,
        max_tokens=LENGTHS[prompt],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


class Load:
    """One client per prompt, which asks again and again until ``stop``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = {prompt: complete(app, prompt) for prompt in LENGTHS}
        self._stopping = threading.Event()
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=[prompt]) for prompt in LENGTHS]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._app.wait(lambda s: len(s["requests"]) == len(LENGTHS), "the requests do not run")

    def _run(self, prompt: str) -> None:
        while not self._stopping.is_set():
            try:
                right = complete(self._app, prompt) == self._expected[prompt]
            except Exception as error:  # whatever a client sees is a finding
                self.wrong.append(f"{prompt}: {error}")
                return
            if not right:
                self.wrong.append(f"{prompt}: another text")

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


class Peak:
    """The replicas that were there at once, whatever their state."""

    def __init__(self, app: App) -> None:
        self._url = f"{app.url}/mell/v1/state"
        self._stopping = threading.Event()
        self.seen: set[frozenset[str]] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                state = httpx.get(self._url, timeout=10.0).raise_for_status().json()
            except httpx.HTTPError:  # between one ingress and the next
                continue
            self.seen.add(frozenset(replica["id"] for replica in state["replicas"]))
            time.sleep(0.02)

    def stop(self) -> int:
        self._stopping.set()
        self._thread.join()
        return max(map(len, self.seen))


def test_replicas_are_replaced_one_by_one_under_load(deploy) -> None:
    """The new blocks are of another size, so that moves carry tokens and no blocks."""
    app = deploy("again", replicas=(2, 2), mell=MELL)
    old = app.wait_ready(2)
    load = Load(app)
    load.start()
    peak = Peak(app)
    try:
        deploy("again", replicas=(2, 2), engine={"block_size": 32}, mell=MELL)
        app.wait(is_renewed(2), "old replicas are still there")
    finally:
        most = peak.stop()
        load.stop()
    assert not load.wrong
    assert most == 3
    moves = [m for m in app.migrations() if m["outcome"] == "committed" and m["from"] in old]
    assert {m["mode"] for m in moves} == {"token"}


def test_nothing_moves_between_different_weights(deploy, tmp_path) -> None:
    app = deploy("weights", replicas=(1, 1), mell=MELL)
    app.wait_ready(1)
    load = Load(app)
    load.start()
    other = str(shutil.copytree(model_path(), tmp_path / "other"))
    try:
        deploy("weights", replicas=(1, 1), source=other, mell=MELL)
        app.wait(is_renewed(1), "the old replica is still there")
    finally:
        load.stop()
    assert not load.wrong
    assert not [m for m in app.migrations() if m["outcome"] == "committed"]


def is_renewed(count: int) -> Callable[[dict[str, Any]], bool]:
    """Whether there are so many replicas, none of them outdated."""
    return lambda state: [r["outdated"] for r in state["replicas"]] == [False] * count
