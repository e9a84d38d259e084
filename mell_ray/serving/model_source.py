"""From a configured model source to a directory, a tokenizer, an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mell_ray.builtin import model_path
from mell_ray.config import BUILTIN_SOURCE, LLMConfig
from mell_ray.errors import ConfigError
from mell_ray.openai.sampling import OPENAI_DEFAULTS, SamplingDefaults, model_defaults

if TYPE_CHECKING:
    from mell_ray.engine import Engine

logger = logging.getLogger(__name__)

WARM_UP_S = 1.0


def resolve_source(llm: LLMConfig) -> str:
    """A directory or a hub id.

    Raises:
        ConfigError: the source is written like a path and is no directory, or holds no model.
    """
    source = llm.model_loading_config.source
    if source == BUILTIN_SOURCE:
        return str(model_path())
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).expanduser().is_dir():
        raise ConfigError(
            f"llm_configs[{llm.model_id}].model_loading_config.model_source: "
            f"{source!r} is not a directory; give a Hugging Face id, a directory, or 'builtin'"
        )
    directory = Path(source).expanduser()
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise ConfigError(
            f"llm_configs[{llm.model_id}].model_loading_config.model_source: "
            f"there is no config.json in {source!r}; it is not a model's directory"
        )
    return str(directory) if looks_like_path else source


def check_directory(llm: LLMConfig) -> None:
    """Look at a model that lies in a directory as far as that goes without its weights, which come
    long after the start; what must be fetched first is looked at by who fetches it.

    Raises:
        ConfigError: names what is wrong, and the setting.
    """
    source = resolve_source(llm)
    builtin = llm.model_loading_config.source == BUILTIN_SOURCE
    if not Path(source).is_dir():
        return
    if not builtin or llm.engine_kwargs.max_model_len is not None:
        context_length(llm)
    if not builtin:
        load_tokenizer(llm)


def load_tokenizer(llm: LLMConfig) -> Any:
    """Raises ConfigError: the source has no tokenizer that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            resolve_source(llm), revision=llm.engine_kwargs.revision, trust_remote_code=False
        )
    except ConfigError:
        raise
    except Exception as error:
        hint = "it needs a tokenizer.json, or what transformers can make one from"
        raise _unusable(llm, "tokenizer", error, hint) from error


def context_length(llm: LLMConfig) -> int:
    """The model's limit of prompt + output in tokens, as configured or from its own config.

    Raises:
        ConfigError: there is no such model, it does not suit ``max_model_len``, or (an
            UnsupportedModelError) the engine cannot run it.
    """
    from mell_ray.engine import families

    config, limit = _model_config(llm), llm.engine_kwargs.max_model_len
    try:
        families.check_config(config, limit)
        return families.context_length(config, limit)
    except ConfigError as error:
        where = "model_loading_config" if error.param == "model_source" else "engine_kwargs"
        message = f"llm_configs[{llm.model_id}].{where}.{error.param}: {error.message}"
        raise type(error)(message, param=error.param) from None


def model_end_token_ids(llm: LLMConfig) -> tuple[int, ...]:
    """The tokens with which the engine ends an answer of this model."""
    from mell_ray.engine.families import end_token_ids
    from mell_ray.engine.generation_file import end_tokens

    generation = end_tokens(resolve_source(llm), llm.engine_kwargs.revision)
    return end_token_ids(generation, _model_config(llm))


def sampling_defaults(llm: LLMConfig) -> SamplingDefaults:
    """What counts for this model where a request leaves it out; says in the log what the model
    brings."""
    from mell_ray.engine.generation_file import read_generation_file

    if llm.engine_kwargs.generation_config == "vllm":
        return OPENAI_DEFAULTS
    file = read_generation_file(resolve_source(llm), llm.engine_kwargs.revision)
    if file is None:
        return OPENAI_DEFAULTS
    defaults, wrong = model_defaults(file.values)
    for name, problem in wrong.items():
        logger.warning("model %s: %s of %s is left out: %s", llm.model_id, name, file.path, problem)
    if defaults.named:
        logger.info(
            "model %s: where a request leaves them out, %s count, as in %s; "
            "engine_kwargs.generation_config: vllm turns that off",
            llm.model_id,
            ", ".join(f"{name}={value}" for name, value in defaults.named.items()),
            file.path,
        )
    return defaults


def _model_config(llm: LLMConfig) -> Any:
    from transformers import AutoConfig

    from mell_ray.engine.families import CONFIG_ERRORS

    try:
        return AutoConfig.from_pretrained(
            resolve_source(llm), revision=llm.engine_kwargs.revision, trust_remote_code=False
        )
    except CONFIG_ERRORS as error:
        hint = "it needs a config.json that this version of transformers knows"
        raise _unusable(llm, "config", error, hint) from error


def _unusable(llm: LLMConfig, part: str, error: Exception, hint: str) -> ConfigError:
    from mell_ray.engine.families import first_line

    return ConfigError(
        f"llm_configs[{llm.model_id}].model_loading_config.model_source: the {part} of "
        f"{llm.model_loading_config.source!r} cannot be loaded ({first_line(error)}); {hint}"
    )


def build_engine(llm: LLMConfig, device: str, *, share_weights: bool) -> Engine:
    """``share_weights``: take them from another replica of this node, or leave them for others."""
    from transformers.utils.logging import disable_progress_bar

    from mell_ray.engine import Engine, load_model
    from mell_ray.engine.grammar import GrammarCompiler
    from mell_ray.engine.weight_store import image_key, load_shared

    disable_progress_bar()
    source, kwargs = resolve_source(llm), llm.engine_kwargs
    image = None
    if share_weights:
        key = image_key(source, kwargs, device)
        model, image = load_shared(key, lambda: load_model(source, kwargs, device))
    else:
        model = load_model(source, kwargs, device)
    grammars = GrammarCompiler(lambda: load_tokenizer(llm), model.vocab_size, model.eos_token_ids)
    engine = Engine(model, kwargs, device, grammars, image)
    engine.warm_up(WARM_UP_S)
    return engine
