"""The requests of a benchmark run. No torch."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from mell_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchRequest:
    prompt_token_ids: list[int]
    output_len: int  # tokens; reached exactly, since end tokens are ignored

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.output_len


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths in tokens, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str) -> LengthRange:
        """``'128'`` or ``'64:128'``.

        Raises:
            ConfigError: ``text`` is neither; ``name`` is the option to name.
        """
        parts = text.split(":")
        try:
            low, high = int(parts[0]), int(parts[-1])
        except ValueError:
            low = high = 0
        if len(parts) > 2 or not 1 <= low <= high:
            raise ConfigError(
                f"{name} is {text!r}; give a number of tokens such as 128, or a range such as "
                "64:128",
                param=name,
            )
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def random_requests(
    count: int, inputs: LengthRange, outputs: LengthRange, vocab_size: int, seed: int
) -> list[BenchRequest]:
    """Prompts of random tokens, which share no prefix; the same ones for the same arguments."""
    rng = random.Random(seed)
    return [
        BenchRequest(
            [rng.randrange(vocab_size) for _ in range(inputs.draw(rng))], outputs.draw(rng)
        )
        for _ in range(count)
    ]


def load_requests(path: Path) -> list[BenchRequest]:
    """A JSON list of ``{"prompt_token_ids": [...], "output_len": N}``.

    Raises:
        ConfigError: the file cannot be read or is something else.
    """
    try:
        entries = json.loads(path.read_text())
        requests = [
            BenchRequest([int(token) for token in e["prompt_token_ids"]], int(e["output_len"]))
            for e in entries
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--requests: {path} is not a JSON list of objects with prompt_token_ids (a list of "
            f"token ids) and output_len: {error!r}",
            param="--requests",
        ) from None
    if not requests or any(not r.prompt_token_ids or r.output_len < 1 for r in requests):
        raise ConfigError(
            f"--requests: {path} must have at least one request, each with a prompt and an "
            "output_len of at least 1",
            param="--requests",
        )
    return requests
