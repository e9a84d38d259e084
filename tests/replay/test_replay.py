"""Replays over real HTTP against a server that answers as told, and the open loop on its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mell_ray.cli import app
from mell_ray.errors import ConfigError, MellError
from mell_ray.openai.protocol import CompletionRequest
from mell_ray.replay.client import Endpoint
from mell_ray.replay.report import notes
from mell_ray.replay.run import open_loop
from mell_ray.replay.session import Finished, replay
from mell_ray.replay.types import Job, Outcome, ReplayOptions
from tests.replay.fake_server import FakeServer, serving


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


async def run(server: FakeServer, jobs: list[Job], timeout_s: float = 60.0) -> Finished:
    async with Endpoint(server.url, key="secret", timeout_s=timeout_s) as endpoint:
        return await replay(jobs, endpoint, ReplayOptions())


async def test_requests_leave_whatever_becomes_of_those_before() -> None:
    """The first answer waits for the last request: a loop that is closed would never end."""
    last_sent = asyncio.Event()

    async def send(job: Job, body: bytes, clock: Callable[[], float]) -> Outcome:
        assert body == b"%d" % job.number
        sent = clock()
        if job.number == 2:
            last_sent.set()
        await last_sent.wait()
        return Outcome(job, sent, end_s=clock())

    jobs = [Job(n, n / 1e3, 1, 1) for n in range(3)]
    outcomes = await open_loop(jobs, lambda job: b"%d" % job.number, send)
    assert [o.job.number for o in outcomes] == [0, 1, 2]
    assert all(o.sent_s >= o.job.at_s for o in outcomes)


async def test_a_client_that_is_slow_counts_its_own_delay() -> None:
    async def send(job: Job, _: bytes, clock: Callable[[], float]) -> Outcome:
        return Outcome(job, clock(), end_s=clock())

    loop = asyncio.get_running_loop()

    def slow_body(job: Job) -> bytes:
        until = loop.time() + 0.01
        while job.number == 1 and loop.time() < until:
            pass
        return b""

    outcomes = await open_loop([Job(n, 0.0, 1, 1) for n in range(2)], slow_body, send)
    assert outcomes[1].late_s >= 0.01


async def test_bodies_ask_for_the_trace(server: FakeServer) -> None:
    jobs = [
        Job(0, 0.0, 40, 5, ("a", "b"), prefix_block=16),
        Job(1, 0.0, 50, 7, ("a", "c"), prefix_block=16),
    ]
    done = await run(server, jobs)
    assert done.summary.failed == 0
    first, second = sorted(server.bodies, key=lambda body: len(body["prompt"]))
    assert first["prompt"][:16] == second["prompt"][:16]
    assert first["prompt"][16:32] != second["prompt"][16:32]
    assert (len(first["prompt"]), first["max_tokens"]) == (40, 5)
    assert first["ignore_eos"] is True
    assert first["model"] == done.model == "fake"
    assert server.headers[0][b"authorization"] == b"Bearer secret"


async def test_answers_are_counted_token_by_token(server: FakeServer) -> None:
    done = await run(server, [Job(0, 0.0, 10, 30), Job(1, 0.0, 107, 30), Job(2, 0.0, 11, 1)])
    assert [o.tokens for o in done.outcomes] == [30, 30, 1]
    assert [len(o.gaps_s) for o in done.outcomes] == [29, 0, 0]
    assert done.summary.output_tokens == 61
    assert done.summary.ok == 3


async def test_requests_and_answers_are_those_of_our_own_server(server: FakeServer) -> None:
    done = await run(server, [Job(0, 0.0, 108, 5)])
    assert (done.summary.failed, done.summary.output_tokens) == (0, 5)
    assert len(done.outcomes[0].gaps_s) == 4
    request = CompletionRequest.model_validate(server.bodies[0])
    assert len(request.prompt) == 1
    assert len(request.prompt[0]) == 108
    assert (request.max_tokens, request.ignore_eos, request.include_usage) == (5, True, True)


async def test_each_way_to_fail_is_told_apart(server: FakeServer) -> None:
    lengths = [10, 101, 101, 102, 103, 104, 105]
    done = await run(server, [Job(n, 0.0, tokens, 4) for n, tokens in enumerate(lengths)])
    assert {error.kind: error.count for error in done.summary.errors} == {
        "HTTP 503: # requests wait": 2,
        "HTTP 502 Bad Gateway": 1,
        "error in the stream: the engine failed": 1,
        "the stream ended without [DONE]": 1,
        "answer of another length": 1,
    }
    assert (done.summary.ok, done.summary.failed) == (1, 6)


async def test_an_answer_that_never_ends_is_given_up(server: FakeServer) -> None:
    done = await run(server, [Job(0, 0.0, 106, 4)], timeout_s=0.05)
    assert [error.kind for error in done.summary.errors] == ["timeout"]
    assert done.summary.ttft_ms.p50 is None


async def test_a_server_that_dies_is_an_error_of_each_request(server: FakeServer) -> None:
    async with Endpoint("http://127.0.0.1:9") as endpoint:
        outcome = await endpoint.send(Job(0, 0.0, 1, 1), b"{}", lambda: 0.0)
        assert outcome.failure is not None
        assert outcome.failure.kind.startswith("connection failed")
        with pytest.raises(MellError, match=r"no server answers at http://127\.0\.0\.1:9"):
            await endpoint.model(None)
    async with Endpoint(server.url + "/v1/") as endpoint:
        assert await endpoint.model("fake") == ("fake", 1000)
        with pytest.raises(ConfigError, match="the server has fake"):
            await endpoint.model("other")


def write_trace(path: Path, prompts: list[int]) -> str:
    rows = [f"{n / 1000},{tokens},3" for n, tokens in enumerate(prompts)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return str(path)


def test_command_line_writes_reports_and_succeeds(server: FakeServer, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.csv", [20, 30, 2000])
    page, figures = tmp_path / "out" / "r.html", tmp_path / "r.json"
    command = ["replay", trace, "--url", server.url, "--html", str(page), "--json", str(figures)]
    result = CliRunner().invoke(app, [*command, "--max-output", "2"])
    assert result.exit_code == 0, result.output
    assert "1 of 3 requests are longer than the model's context of 1,000 tokens" in result.output
    assert "Time to first token" in result.output
    told = json.loads(figures.read_text())
    assert (told["requests"], told["failed"], told["output_tokens"]) == (3, 0, 6)
    assert told["settings"]["max_output"] == 2
    assert "t on fake" in page.read_text()


def test_command_line_fails_where_a_request_did(server: FakeServer, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.csv", [20, 101])
    result = CliRunner().invoke(app, ["replay", trace, "--url", server.url])
    assert result.exit_code == 1
    assert "1 of 2 requests failed" in result.output
    assert "HTTP 503" in result.output


def test_command_line_names_what_is_wrong(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.csv", [20])
    for options, message in (
        (["--token-ids", "abc"], "LOW:HIGH"),
        (["--time-compression", "0"], "time_compression"),
    ):
        result = CliRunner().invoke(app, ["replay", trace, *options])
        assert result.exit_code == 2
        assert message in result.output


async def test_a_replay_that_is_stopped_keeps_what_had_ended(server: FakeServer) -> None:
    halt: list[Callable[[], None]] = []

    class Stop:
        def sent(self) -> None: ...

        def ended(self, _: Outcome) -> None:
            asyncio.get_running_loop().call_soon(halt[0])

    jobs = [Job(0, 0.0, 10, 3), Job(1, 0.0, 106, 3), Job(2, 3600.0, 10, 3)]
    async with Endpoint(server.url) as endpoint:
        done = await replay(jobs, endpoint, ReplayOptions(), watcher=Stop(), stoppable=halt.append)
    assert [o.job.number for o in done.outcomes] == [0]
    assert (done.summary.requests, done.summary.failed, done.summary.left_out) == (1, 0, 2)
    assert any("interrupted: 2 requests" in note for note in notes(done.summary))


def test_ctrl_c_writes_the_reports(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = write_trace(tmp_path / "t.csv", [20, 106])
    figures, page = tmp_path / "r.json", tmp_path / "r.html"

    send = Endpoint.send

    async def send_and_interrupt(self: Endpoint, *args: Any) -> Outcome:
        outcome = await send(self, *args)
        os.kill(os.getpid(), signal.SIGINT)
        return outcome

    monkeypatch.setattr(Endpoint, "send", send_and_interrupt)
    command = ["replay", trace, "--url", server.url, "--json", str(figures), "--html", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130, result.output
    told = json.loads(figures.read_text())
    assert (told["requests"], told["left_out"], told["failed"]) == (1, 1, 0)
    assert "interrupted" in page.read_text()


async def test_answers_without_usage_are_said_to_be_uncounted(server: FakeServer) -> None:
    done = await run(server, [Job(0, 0.0, 109, 5), Job(1, 0.0, 10, 5)])
    assert (done.summary.ok, done.summary.uncounted) == (2, 1)
    assert any("told no token counts" in note for note in notes(done.summary))


async def test_a_refusal_is_told_in_the_words_of_other_servers(server: FakeServer) -> None:
    done = await run(server, [Job(0, 0.0, 110, 5)])
    assert done.summary.errors[0].example == "HTTP 400: too long for me"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "", "http://host:99999"])
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Endpoint(url)


def test_a_report_that_cannot_be_written_is_named_before_anything_is_sent(
    server: FakeServer, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "t.csv", [20])
    command = ["replay", trace, "--url", server.url, "--html", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert not server.bodies
