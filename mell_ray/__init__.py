"""mell-ray: serve large language models on as few GPUs as possible, on Ray Serve.

``build_openai_app`` makes the Serve application, ``connect`` calls a running one, ``MellConfig``
is every setting, ``errors`` every exception. Ray is imported only when the first two are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mell_ray import errors
from mell_ray.config import MellConfig

if TYPE_CHECKING:
    from mell_ray.serving.app import build_openai_app
    from mell_ray.serving.client import connect

__all__ = ["MellConfig", "build_openai_app", "connect", "errors"]


def __getattr__(name: str) -> Any:
    if name == "build_openai_app":
        from mell_ray.serving.app import build_openai_app

        return build_openai_app
    if name == "connect":
        from mell_ray.serving.client import connect

        return connect
    raise AttributeError(f"module 'mell_ray' has no attribute {name!r}")
