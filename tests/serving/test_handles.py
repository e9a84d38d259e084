"""Other Ray applications and drivers call the application without HTTP."""

from __future__ import annotations

import asyncio

import pytest
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

import mell_ray
from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import App

CHAT = [{"role": "user", "content": "Tell me of Emma."}]
FIELDS = {"max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("handle", replicas=(1, 1))


def test_client_of_a_driver(app: App) -> None:
    client = mell_ray.connect(app.name)
    whole = client.chat(CHAT, **FIELDS)
    assert whole["object"] == "chat.completion"
    assert whole["model"] == MODEL_ID
    chunks = list(client.chat(CHAT, **FIELDS, stream=True))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]

    completion = client.completions("It was a truth", **FIELDS)
    steps = list(client.generate("It was a truth", **FIELDS, stream=True))
    assert "".join(step["text"] for step in steps) == completion["choices"][0]["text"]
    generated = client.generate("It was a truth", **FIELDS)
    tokens = [token for step in steps for token in step["token_ids"]]
    assert generated["choices"][0]["token_ids"] == tokens
    assert generated["usage"]["completion_tokens"] == len(tokens)
    assert client.state()["replicas"][0]["model"] == MODEL_ID


def test_handle_inside_another_deployment(app: App) -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Caller:
        def __init__(self, name: str) -> None:
            self._mell = serve.get_app_handle(name)

        async def ask(self) -> tuple[str, str]:
            whole = await self._mell.completions.remote(prompt="It was a truth", **FIELDS)
            streaming = self._mell.options(stream=True)
            text = ""
            async for chunk in streaming.completions.remote(
                {"prompt": "It was a truth", "stream": True, **FIELDS}
            ):
                text += chunk["choices"][0]["text"]
            return whole["choices"][0]["text"], text

    caller = serve.run(Caller.bind(app.name), name="caller", route_prefix=None)
    try:
        whole, streamed = caller.ask.remote().result()
        assert whole == streamed
    finally:
        serve.delete("caller")


def test_errors_name_the_field(app: App) -> None:
    client = mell_ray.connect(app.name)
    with pytest.raises(mell_ray.errors.InvalidRequestError, match="temperature") as caught:
        client.completions("a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(mell_ray.errors.ModelNotFoundError, match="nope"):
        client.completions("a", model="nope")


@pytest.mark.usefixtures("cluster")
def test_unknown_application() -> None:
    with pytest.raises(RayServeException):
        mell_ray.connect("nobody")


def test_stream_left_early_frees_the_request(app: App) -> None:
    stream = mell_ray.connect(app.name).generate(
        "a", max_tokens=3000, temperature=0, stream=True, ignore_eos=True
    )
    next(stream)
    stream.close()
    seen = 0

    def gone(state: dict) -> bool:
        nonlocal seen
        seen = max([seen, *(request["tokens"] for request in state["requests"])])
        return not state["requests"]

    app.wait(gone, "the request goes on")
    assert seen < 2000


def test_concurrent_async_calls(app: App) -> None:
    @ray.remote(num_cpus=0)
    class Caller:
        async def ask(self, name: str) -> list[str]:
            handle = serve.get_app_handle(name)
            calls = [handle.generate.remote(prompt=f"Chapter {i}.", **FIELDS) for i in range(8)]
            answers = await asyncio.gather(*calls)
            return [answer["choices"][0]["text"] for answer in answers]

    caller = Caller.remote()
    texts = ray.get(caller.ask.remote(app.name))
    alone = mell_ray.connect(app.name).generate("Chapter 7.", **FIELDS)
    assert texts[7] == alone["choices"][0]["text"]
