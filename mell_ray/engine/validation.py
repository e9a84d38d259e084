"""Whether an engine can run a request at all. Checked at admission, never in a step."""

from __future__ import annotations

import math

from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import InvalidRequestError


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{param}: {message}", param=param)


def validate_state(
    state: RequestState, *, vocab_size: int, max_model_len: int, capacity_tokens: int
) -> None:
    """Check tokens, lengths and sampling parameters.

    Args:
        capacity_tokens: what the whole KV pool holds. A request alone must fit, or it would be
            preempted for ever.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    prompt, output = state.prompt_token_ids, state.output_token_ids
    _require(len(prompt) > 0, "prompt", "must have at least one token")
    for name, tokens in (("prompt", prompt), ("output_token_ids", output)):
        _require(
            min(tokens, default=0) >= 0 and max(tokens, default=0) < vocab_size,
            name,
            f"has a token id outside the vocabulary of {vocab_size}",
        )
    _validate_sampling(state.sampling, vocab_size)
    max_tokens = state.sampling.max_tokens
    _require(
        len(prompt) + max_tokens <= max_model_len,
        "max_tokens",
        f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}, together "
        f"{len(prompt) + max_tokens}; this model takes at most {max_model_len}",
    )
    # The last token is sampled but never computed.
    _require(
        len(prompt) + max_tokens - 1 <= capacity_tokens,
        "max_tokens",
        f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; the KV pool holds "
        f"{capacity_tokens} tokens in all",
    )
    _require(
        state.sampling.logprobs is None or len(state.output_logprobs) == len(output),
        "output_logprobs",
        f"must have one entry for each of the {len(output)} output tokens, as logprobs are on",
    )


def _validate_sampling(s: SamplingParams, vocab_size: int) -> None:
    _require(s.max_tokens >= 1, "max_tokens", f"must be at least 1, not {s.max_tokens}")
    _require(
        math.isfinite(s.temperature) and s.temperature >= 0,
        "temperature",
        f"must be a number of at least 0, not {s.temperature}",
    )
    _require(0 < s.top_p <= 1, "top_p", f"must be above 0 and at most 1, not {s.top_p}")
    _require(s.top_k >= 0, "top_k", f"must be 0 (off) or more, not {s.top_k}")
    _require(0 <= s.min_p <= 1, "min_p", f"must be between 0 and 1, not {s.min_p}")
    _require(s.min_tokens >= 0, "min_tokens", f"must be at least 0, not {s.min_tokens}")
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(s, name)
        _require(math.isfinite(value), name, f"must be a finite number, not {value}")
    _require(
        math.isfinite(s.repetition_penalty) and s.repetition_penalty > 0,
        "repetition_penalty",
        f"must be above 0, not {s.repetition_penalty}",
    )
    _require(
        s.logprobs is None or 0 <= s.logprobs <= vocab_size,
        "logprobs",
        f"must be between 0 and {vocab_size}, not {s.logprobs}",
    )
    _require(
        s.grammar is None or not s.ignore_eos,
        "ignore_eos",
        "cannot be combined with a grammar, whose end is an end token",
    )
    for token, bias in s.logit_bias:
        _require(
            0 <= token < vocab_size, "logit_bias", f"token id {token} is not in the vocabulary"
        )
        _require(math.isfinite(bias), "logit_bias", f"the bias of token {token} is not finite")
    for token in s.stop_token_ids:
        _require(
            0 <= token < vocab_size, "stop_token_ids", f"token id {token} is not in the vocabulary"
        )
