"""The two shapes of log-probabilities in the API.

The numbers are of the model's raw distribution, before temperature and penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mell_ray.openai.text import LogprobEntry, TokenText

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write, as at OpenAI


def chat_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}``."""
    content = [
        {**_chat_token(entry.token), "top_logprobs": [_chat_token(other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any]:
    """Parallel lists; each ``top_logprobs`` object holds the sampled token too, as at OpenAI."""
    return {
        "tokens": [entry.token.text for entry in entries],
        "token_logprobs": [_finite(entry.token.logprob) for entry in entries],
        "top_logprobs": [
            {token.text: _finite(token.logprob) for token in (*entry.top, entry.token)}
            for entry in entries
        ],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _chat_token(token: TokenText) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.bytes),
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB  # also true of NaN
