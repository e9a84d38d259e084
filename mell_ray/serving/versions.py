"""What of a configuration makes two replicas of a model different. Pure."""

from __future__ import annotations

import hashlib

from mell_ray.config import LLMConfig


def config_hash(llm: LLMConfig) -> str:
    """Identifies what a replica was built from: same hash, interchangeable replicas."""
    return _hash(
        llm.model_dump_json(
            include={"model_loading_config", "engine_kwargs"},
            exclude={"engine_kwargs": {"generation_config"}},  # read by the ingress alone
        )
    )


def weights_hash(llm: LLMConfig) -> str:
    """Identifies the weights: only between equal ones may a request move."""
    loading = llm.model_loading_config
    return _hash(f"{loading.source} at {llm.engine_kwargs.revision}")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
