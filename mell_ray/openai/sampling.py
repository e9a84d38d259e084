"""How tokens are drawn where a request does not say: bounds of the fields, and a model's defaults.

What a request names always wins. What it leaves out is as in OpenAI's API, or as the model's
authors recommend in its ``generation_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from mell_ray.openai.limits import MAX_INT32, MAX_REPETITION_PENALTY, MAX_TEMPERATURE

MaxTokens = Annotated[StrictInt, Field(ge=1, le=MAX_INT32)]
Temperature = Annotated[StrictFloat, Field(ge=0, le=MAX_TEMPERATURE)]
TopP = Annotated[StrictFloat, Field(gt=0, le=1)]
TopK = Annotated[StrictInt, Field(ge=-1, le=MAX_INT32)]
MinP = Annotated[StrictFloat, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[StrictFloat, Field(gt=0, le=MAX_REPETITION_PENALTY)]


class SamplingDefaults(BaseModel):
    """What counts where a request leaves a field out. Without arguments: OpenAI's defaults.

    The aliases are the names in ``generation_config.json``. Its ``do_sample`` is not looked at, as
    in vLLM: a client says with ``temperature`` whether it wants to sample.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    max_tokens: Annotated[MaxTokens | None, Field(alias="max_new_tokens")] = None  # the server's

    @property
    def named(self) -> dict[str, Any]:
        """The fields that the model sets, with their names in its file."""
        return self.model_dump(exclude_unset=True, by_alias=True)


OPENAI_DEFAULTS = SamplingDefaults()


def model_defaults(values: Mapping[str, Any]) -> tuple[SamplingDefaults, dict[str, str]]:
    """The defaults in the content of a ``generation_config.json``.

    :returns: the defaults, and the fields that are left out because their values are out of
        range, with what is wrong with them.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingDefaults.model_validate(given), {}
    except ValidationError as error:
        wrong = {
            str(item["loc"][0]): f"{item['msg']}, not {item['input']!r}" for item in error.errors()
        }
    right = {name: value for name, value in given.items() if name not in wrong}
    return SamplingDefaults.model_validate(right), wrong
