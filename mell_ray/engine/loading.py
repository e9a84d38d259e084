"""Weights from a directory or the hub onto a device.

What transformers does with a checkpoint that does not fit its config is to fill the gaps with
random numbers and to print a table. Here that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_accelerate_available

from mell_ray.config import BUILTIN_SOURCE, EngineConfig
from mell_ray.engine.families import CONFIG_ERRORS, check_config, first_line
from mell_ray.engine.generation_file import end_tokens
from mell_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_NAMED_KEYS = 3


def load_weights(source: str, config: EngineConfig, device: torch.device) -> PreTrainedModel:
    """The model of ``source`` with its weights, on ``device``.

    A tensor that keeps its dtype is a view of the memory-mapped file until it goes to the device,
    so the host holds no copy of its own of it; one that changes its dtype is converted alone. With
    ``accelerate`` installed, tensors go to a GPU one by one as they are read; without it, those
    that are converted, or merged as the experts of some MoE models are, pass through the host's
    memory all together. Code in the checkpoint is never run.

    Raises:
        ConfigError: there is no such model, or its files are missing, damaged, or do not fit its
            config; says which.
        UnsupportedModelError: the engine cannot run this architecture; raised before weights are
            read.
    """
    path: str | Path = source
    if source == BUILTIN_SOURCE:
        from mell_ray.builtin import model_path

        path = model_path()
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    try:
        hf_config = AutoConfig.from_pretrained(path, **common)
    except CONFIG_ERRORS as error:
        raise _unloadable(
            source,
            f"{first_line(error)}; model_source must be a Hugging Face id, a directory with "
            "config.json and weights, or 'builtin'",
        ) from error
    check_config(hf_config, config.max_model_len)
    if device.type != "cpu" and is_accelerate_available():
        common["device_map"] = {"": device}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=hf_config,
            generation_config=end_tokens(str(path), config.revision),
            dtype=_dtype(config, device),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
            **common,
        )
    except SafetensorError as error:
        raise _unloadable(
            source, f"a safetensors file is damaged or incomplete ({error}); download it again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _unloadable(source, first_line(error)) from error
    _check_complete(source, info)
    return model.to(device)


def _dtype(config: EngineConfig, device: torch.device) -> str:
    if config.dtype == "auto" and device.type == "cpu":
        return "float32"
    return config.dtype


def _check_complete(source: str, info: dict[str, Any]) -> None:
    for kind, problem in (
        ("missing_keys", "its files lack"),
        ("mismatched_keys", "its config and its files disagree on the shape of"),
    ):
        if info[kind]:
            raise _unloadable(source, f"{problem} {_names(info[kind])}")
    if info["unexpected_keys"]:
        logger.warning(
            "%s holds weights that its config has no use for: %s",
            source,
            _names(info["unexpected_keys"]),
        )


def _names(keys: Collection[Any]) -> str:
    names = sorted(key if isinstance(key, str) else str(next(iter(key))) for key in keys)
    shown = ", ".join(names[:_NAMED_KEYS])
    return shown if len(names) <= _NAMED_KEYS else f"{shown} and {len(names) - _NAMED_KEYS} more"


def _unloadable(source: str, reason: str) -> ConfigError:
    return ConfigError(f"cannot load the model {source!r}: {reason}", param="model_source")
