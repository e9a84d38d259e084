"""A model's ``generation_config.json``, as it is written.

transformers refuses the whole model where one value in the file is out of range. Here a model's
end tokens do not depend on what else stands there.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationFile:
    path: str
    values: dict[str, Any]


def read_generation_file(source: str, revision: str | None) -> GenerationFile | None:
    """The file of a directory or a hub id; None where there is none that can be read."""
    try:
        path = cached_file(source, FILE_NAME, revision=revision)
    except OSError:  # the model has none, or the hub cannot be reached
        return None
    assert isinstance(path, str)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not used, as it cannot be read: %s", path, error)
        return None
    if not isinstance(values, dict):
        logger.warning("%s is not used, as it holds no JSON object", path)
        return None
    return GenerationFile(path, values)


def end_tokens(source: str, revision: str | None) -> GenerationConfig:
    """A generation config with nothing but the end tokens of the file, if it names any."""
    file = read_generation_file(source, revision)
    return GenerationConfig(eos_token_id=file.values.get("eos_token_id") if file else None)
