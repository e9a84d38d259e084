"""Tokens that come several at once: a busy ingress reads what has gathered meanwhile."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from starlette.testclient import TestClient

from mell_ray.builtin import MODEL_ID
from mell_ray.serving.runner import Job
from mell_ray.serving.track import Accepted
from tests.unit.serving.inprocess_api import InProcessRuns, make_api

ONE_BY_ONE = InProcessRuns.run
LUMP = 8
NOW = {"type": "function", "function": {"name": "now"}}
CALL = {
    "messages": [{"role": "user", "content": "What time is it?"}],
    "tools": [NOW],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
STOP = {"messages": [{"role": "user", "content": "Tell me of Emma."}], "stop": [" the"]}


async def in_lumps(runs: InProcessRuns, job: Job) -> AsyncGenerator[Accepted, None]:
    lump: Accepted | None = None
    async with aclosing(ONE_BY_ONE(runs, job)) as accepted:
        async for each in accepted:
            lump = each if lump is None else lump.joined(each)
            if len(lump.token_ids) >= LUMP or each.finish_reason is not None:
                yield lump
                lump = None


@pytest.mark.parametrize("asked", [CALL, STOP], ids=["call", "stop"])
def test_an_answer_ends_where_it_ends_however_its_tokens_come(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    llm = {
        "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
        "accelerator_type": "CPU",
    }
    client = TestClient(make_api(monkeypatch, {"llm_configs": [llm]}))
    body = {"model": MODEL_ID, "max_tokens": 100, "seed": 4, "logprobs": True, **asked}
    answers = []
    for run in (ONE_BY_ONE, in_lumps):
        monkeypatch.setattr(InProcessRuns, "run", run)
        answers.append(client.post("/v1/chat/completions", json=body).raise_for_status().json())
    usages = [answer["usage"] for answer in answers]
    assert usages[0] == usages[1]
    assert usages[0]["completion_tokens"] < 100  # the end was found
    choices = [answer["choices"][0] for answer in answers]
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    tokens = [[entry["token"] for entry in choice["logprobs"]["content"]] for choice in choices]
    assert tokens[0] == tokens[1]
    assert choices[0]["message"] == choices[1]["message"]
    assert choices[0]["finish_reason"] == choices[1]["finish_reason"]
