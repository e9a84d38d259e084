"""The Ray layer: ingress, Router, fleet, GPU replicas and Migrator.

``build_openai_app`` is imported on first use, so that the pure modules here need no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mell_ray.serving.app import build_openai_app

__all__ = ["build_openai_app"]


def __getattr__(name: str) -> Any:
    if name == "build_openai_app":
        from mell_ray.serving.app import build_openai_app

        return build_openai_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
