"""A small client for other Ray applications and drivers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle


class MellClient:
    """Calls the application from a driver or script; inside an event loop use the handle itself
    (``serve.get_app_handle``) and await.

    Every method takes the fields of the OpenAI request as keywords; ``model`` may be left out.
    With ``stream=True`` it returns an iterator of chunks instead of the answer.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Any:
        """Chat completion: a dict in OpenAI's shape, or an iterator of its chunks."""
        return self._call("chat", {"messages": messages}, fields)

    def completions(self, prompt: str | list[int], **fields: Any) -> Any:
        """Text completion: a dict in OpenAI's shape, or an iterator of its chunks."""
        return self._call("completions", {"prompt": prompt}, fields)

    def generate(self, prompt: str | list[int], **fields: Any) -> Any:
        """Text and token ids without OpenAI's wrapping, or an iterator of steps."""
        return self._call("generate", {"prompt": prompt}, fields)

    def state(self) -> dict[str, Any]:
        """Replicas and requests, as ``GET /mell/v1/state``."""
        return self._handle.state_snapshot.remote().result()

    def _call(self, method: str, first: dict[str, Any], fields: dict[str, Any]) -> Any:
        if fields.get("stream"):
            return self._stream(method, {**first, **fields})
        return getattr(self._handle, method).remote(**first, **fields).result()

    def _stream(self, method: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chunks = getattr(self._handle.options(stream=True), method).remote(**fields)
        try:
            yield from chunks
        finally:
            chunks.cancel()  # left early: the request is dropped


def connect(app_name: str = "mell") -> MellClient:
    """A client of the running application ``app_name`` on the Ray cluster of this process.

    Raises:
        RayServeException: there is no such application.
    """
    return MellClient(serve.get_app_handle(app_name))
