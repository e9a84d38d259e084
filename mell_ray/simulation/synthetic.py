"""Requests out of thin air, for questions that no trace at hand answers.

Arrivals are a renewal process: Poisson, or Gamma-distributed gaps with a coefficient of variation
above 1 (bursts) or below it (regular). Lengths are lognormal, which is close to what services
report. The same specification gives the same rows on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mell_ray.config import parse_config
from mell_ray.errors import ConfigError
from mell_ray.simulation.types import TraceRow

PREFIX = "synthetic:"
EXAMPLE = "synthetic:gamma,rate=2,cv=3,duration=600,prompt_median=500,prompt_p99=4000"

_Z99 = 2.3263478740408408  # the 99th percentile of a standard normal


class SyntheticSpec(BaseModel):
    """What to generate. Lengths are given as median and p99, or as mean and sigma (of the log)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    process: Literal["poisson", "gamma"]
    rate: float = Field(gt=0, allow_inf_nan=False, description="Requests per second, mean.")
    duration: float = Field(gt=0, allow_inf_nan=False, description="Seconds of arrivals.")
    cv: float = Field(default=1.0, gt=0, le=100, description="Variation of gaps; 'gamma' only.")
    prompt_median: float | None = Field(default=None, ge=1)
    prompt_p99: float | None = Field(default=None, ge=1)
    prompt_mean: float | None = Field(default=None, ge=1)
    prompt_sigma: float | None = Field(default=None, ge=0, le=10)
    output_median: float | None = Field(default=None, ge=1)
    output_p99: float | None = Field(default=None, ge=1)
    output_mean: float | None = Field(default=None, ge=1)
    output_sigma: float | None = Field(default=None, ge=0, le=10)
    max_prompt: int = Field(default=128_000, ge=1, description="Longer prompts are cut to it.")
    max_output: int = Field(default=32_000, ge=1, description="Longer outputs are cut to it.")
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> SyntheticSpec:
        if self.process == "poisson" and self.cv != 1.0:
            raise ValueError("cv is 1 by definition of 'poisson'; use 'gamma' for another")
        self.lengths("prompt")
        self.lengths("output")
        return self

    def lengths(self, which: Literal["prompt", "output"]) -> tuple[float, float]:
        """(mu, sigma) of the logarithm of prompt or output lengths."""
        median, p99 = getattr(self, f"{which}_median"), getattr(self, f"{which}_p99")
        mean, sigma = getattr(self, f"{which}_mean"), getattr(self, f"{which}_sigma")
        if (mean is None) != (sigma is None):
            raise ValueError(f"{which}_mean and {which}_sigma go together")
        if mean is not None:
            if median is not None or p99 is not None:
                raise ValueError(f"give {which} lengths as median and p99, or as mean and sigma")
            return math.log(mean) - sigma * sigma / 2, sigma
        median = median or (500.0 if which == "prompt" else 150.0)
        p99 = p99 or 6 * median
        if p99 < median:
            raise ValueError(f"{which}_p99 ({p99:g}) is below {which}_median ({median:g})")
        return math.log(median), math.log(p99 / median) / _Z99


def parse_spec(text: str) -> SyntheticSpec:
    """Read ``synthetic:poisson,rate=2,duration=600`` or ``synthetic:gamma,cv=3,...``.

    Raises:
        ConfigError: unknown or wrong setting; the message names it.
    """
    process, *settings = (part.strip() for part in text.removeprefix(PREFIX).split(","))
    given: dict[str, str] = {"process": process}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text}: {setting!r} is not name=value; for example {EXAMPLE}")
        if name in given:
            raise ConfigError(f"{text}: {name} stands there twice")
        given[name] = value
    try:
        return parse_config(SyntheticSpec, given)
    except ConfigError as error:
        raise ConfigError(f"{text}: {error.message}; for example {EXAMPLE}") from None


def generate(spec: SyntheticSpec) -> list[TraceRow]:
    """The requests of ``spec``, in order of arrival.

    Arrivals and lengths draw from streams of their own, so that changing one keeps the other.

    Raises:
        ConfigError: no request falls into the duration.
    """
    prompts = _lengths(spec, "prompt", spec.max_prompt)
    outputs = _lengths(spec, "output", spec.max_output)
    rows = [
        TraceRow(number, t, next(prompts), next(outputs))
        for number, t in enumerate(_arrivals(spec))
    ]
    if not rows:
        raise ConfigError(
            f"synthetic trace: no request in {spec.duration:g} s at {spec.rate:g} a second; "
            "raise rate or duration"
        )
    return rows


def _arrivals(spec: SyntheticSpec) -> Iterator[float]:
    rng = random.Random(f"{spec.seed}/arrivals")
    shape = 1 / spec.cv**2
    scale = 1 / (spec.rate * shape)
    t = 0.0
    while True:
        t += rng.expovariate(spec.rate) if shape == 1 else rng.gammavariate(shape, scale)
        if t >= spec.duration:
            return
        yield round(t, 6)


def _lengths(
    spec: SyntheticSpec, which: Literal["prompt", "output"], longest: int
) -> Iterator[int]:
    rng = random.Random(f"{spec.seed}/{which}")
    mu, sigma = spec.lengths(which)
    while True:
        yield min(max(round(rng.lognormvariate(mu, sigma)), 1), longest)
