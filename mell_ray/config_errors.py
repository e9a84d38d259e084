"""What a wrong configuration is answered with: the setting, what is wrong, and what to write.

Whoever comes from Ray Serve LLM or vLLM brings settings that mell-ray does not have. These are
refused with the reason, and with the setting that stands for it here.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_ONE_GPU = "a replica has one GPU; leave it out"
_PACKED = (
    "replicas open as KV cache and step time need them, not by a number of requests; see "
    "deployment_config.max_ongoing_requests and tpot_target_ms"
)
_AT_ONCE = "replicas open at once, and end after mell.fleet.idle_grace_s"
_NO_LORA = "LoRA is not supported"
_NO_SPECULATION = "speculative decoding is not supported"
_TOOLS = "tool calls are always read, in the format of tool_call_format"
_RAY_PLACES = "a replica is one Ray actor; say what it runs on with accelerator_type"
_HOST_KV = "KV is not kept in host memory: what has no room is moved or preempted; leave it out"
_INGRESS = "see the settings of mell.ingress"
_MEDIA = "multimodal input is not supported"

#: Settings of Ray Serve LLM and vLLM that are not ours, by their last name, and why.
FOREIGN: Mapping[str, str] = {
    # engine_kwargs
    "tensor_parallel_size": _ONE_GPU,
    "pipeline_parallel_size": _ONE_GPU,
    "data_parallel_size": _ONE_GPU,
    "enable_expert_parallel": _ONE_GPU,
    "distributed_executor_backend": _ONE_GPU,
    "enable_chunked_prefill": "prefill is always chunked, by max_num_batched_tokens; leave it out",
    "trust_remote_code": "code of a model's repository is never run; leave it out",
    "quantization": "quantised weights are not supported",
    "swap_space": _HOST_KV,
    "cpu_offload_gb": _HOST_KV,
    "enable_lora": _NO_LORA,
    "max_loras": _NO_LORA,
    "max_lora_rank": _NO_LORA,
    "lora_config": _NO_LORA,
    "speculative_config": _NO_SPECULATION,
    "speculative_model": _NO_SPECULATION,
    "num_speculative_tokens": _NO_SPECULATION,
    "tokenizer": "the tokenizer is the model's own",
    "tokenizer_mode": "the tokenizer is the model's own",
    "tokenizer_source": "the tokenizer is the model's own",
    "served_model_name": "clients use model_loading_config.model_id",
    "model": "it stands in model_loading_config.model_source",
    "download_dir": "set HF_HOME in the environment",
    "load_format": "weights are read from safetensors; leave it out",
    "seed": "a request brings its own seed; the scheduler's is mell.seed",
    "enable_auto_tool_choice": _TOOLS,
    "tool_call_parser": _TOOLS,
    "chat_template": "the chat template is the model's own",
    "max_seq_len_to_capture": "all decode steps of a GPU have CUDA graphs; see enforce_eager",
    "disable_log_stats": "logs: see mell.log_level",
    "disable_log_requests": "requests are never logged; leave it out",
    "guided_decoding_backend": "structured answers need no setting; leave it out",
    "limit_mm_per_prompt": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "kv_transfer_config": "see mell.migration",
    # deployment_config and its autoscaling_config
    "num_replicas": "write autoscaling_config.min_replicas and max_replicas, equal if it is fixed",
    "initial_replicas": "see min_replicas and mell.fleet.spare_gpus",
    "target_ongoing_requests": _PACKED,
    "target_num_ongoing_requests_per_replica": _PACKED,
    "upscale_delay_s": _AT_ONCE,
    "downscale_delay_s": _AT_ONCE,
    "upscaling_factor": _AT_ONCE,
    "downscaling_factor": _AT_ONCE,
    "upscale_smoothing_factor": _AT_ONCE,
    "downscale_smoothing_factor": _AT_ONCE,
    "metrics_interval_s": _AT_ONCE,
    "look_back_period_s": _AT_ONCE,
    "ray_actor_options": _RAY_PLACES,
    "placement_group_config": _RAY_PLACES,
    "placement_group_bundles": _RAY_PLACES,
    "placement_group_strategy": _RAY_PLACES,
    "resources_per_bundle": _RAY_PLACES,
    "graceful_shutdown_timeout_s": "see mell.ingress.drain_s",
    "graceful_shutdown_wait_loop_s": "see mell.ingress.drain_s",
    # llm_configs and build_openai_app
    "llm_engine": "the engine is mell-ray's own; leave it out",
    "log_engine_metrics": "metrics are always on; leave it out",
    "runtime_env": "set it for the application, beside import_path",
    "experimental_configs": "leave it out",
    "server_cls": "leave it out",
    "ingress_cls_config": _INGRESS,
    "ingress_deployment_config": _INGRESS,
}


def describe(model: type[BaseModel], error: ValidationError) -> str:
    """All that is wrong, each with its path, on one line."""
    return "; ".join(_describe(model, item) for item in error.errors())


def _describe(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    path: Sequence[str | int] = item["loc"]
    where = ".".join(str(part) for part in path) or "(top level)"
    return f"{where}: {_problem(model, path, item)}"


def _problem(model: type[BaseModel], path: Sequence[str | int], item: Mapping[str, Any]) -> str:
    match item["type"]:
        case "extra_forbidden":
            return f"unknown setting{_advice(model, path)}"
        case "missing":
            return "is missing"
        case "model_type" | "dict_type":
            return f"must be a mapping of settings, not {_short(item['input'])}"
        case "list_type" | "tuple_type":
            return f"must be a list, not {_short(item['input'])}"
        case "too_short":
            return "must have at least one entry"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "value_error":
        return message
    message = message.partition(", unable to ")[0]
    return f"{message}, not {_short(item['input'])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _advice(model: type[BaseModel], path: Sequence[str | int]) -> str:
    """Why a setting is not there, or which one was meant."""
    name = str(path[-1])
    known = list(_fields(model, path[:-1]))
    if reason := FOREIGN.get(name):
        return f" ({reason})"
    elsewhere = [where for where in _paths(model) if where.rpartition(".")[2] == name]
    if elsewhere:
        return f"; there is {' and '.join(elsewhere)}"
    if meant := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
        return f"; did you mean {meant[0]!r}?"
    return f"; there are: {', '.join(known)}" if known else ""


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> Mapping[str, Any]:
    """The settings of the section at ``path``."""
    for part in path:
        if isinstance(part, int):
            continue  # an entry of a list of sections: `_section` has looked into the list
        field = model.model_fields.get(part)
        section = _section(field.annotation) if field is not None else None
        if section is None:
            return {}
        model = section
    return model.model_fields


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model that a setting's value, or the entries of its list, have."""
    candidates = typing.get_args(annotation) or (annotation,)
    for kind in candidates:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full name of every setting below ``model``."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        is_list = typing.get_origin(field.annotation) is list
        path = f"{prefix}{name}{'[]' if is_list and section else ''}"
        if section is None:
            yield path
        else:
            yield from _paths(section, f"{path}.")
