"""One accelerator: KV pool, prefix cache, batch planning, model runner, sampling.

``Engine`` and ``load_model`` are imported on first use, so that the plain types of this package
can be had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mell_ray.engine.engine import Engine
    from mell_ray.engine.model import LoadedModel, load_model

__all__ = ["Engine", "LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from mell_ray.engine.engine import Engine

        return Engine
    if name in ("LoadedModel", "load_model"):
        from mell_ray.engine import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
