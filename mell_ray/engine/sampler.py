"""From logits to tokens: penalties, bias, grammar, temperature, top-k, top-p, min-p, noise, in that
order.

Nothing here keeps state between steps that could not be derived from a sequence's tokens, so a
request that moves needs to carry none. Work that only some parameters need is done only for the
rows that ask for it. On a GPU nothing waits for the device before ``Draw.results`` is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from mell_kernels import ops
from mell_kernels.rows import SamplingRows
from mell_kernels.sampling import noise_key, ranked_topk

from mell_ray.engine.sequence import Sequence
from mell_ray.engine.transfer import to_device
from mell_ray.engine.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's result; ``error`` says why there is no token."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class PenaltyCounts:
    """How often each token stood in a sequence so far; caught up with its tokens on use."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.output = torch.zeros(vocab_size, device=device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._upto = 0

    def update(self, seq: Sequence) -> None:
        new = torch.tensor(seq.token_ids[self._upto :], dtype=torch.int64)
        skipped = max(0, len(seq.state.prompt_token_ids) - self._upto)
        self._upto = seq.num_tokens
        new = to_device(new, self.seen.device)
        self.seen.index_fill_(0, new, True)
        output = new[skipped:]
        self.output.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))


class Draw:
    """Tokens that are drawn, or being drawn while the host does something else."""

    def __init__(
        self,
        tokens: torch.Tensor,
        raw: torch.Tensor | None,
        params: list[SamplingParams],
        failed: dict[int, str | None],
    ) -> None:
        self._tokens = tokens  # [R]
        self._raw = raw  # log-probabilities of the rows that asked for them
        self._params = params
        self._failed = failed  # by row, why nothing can be drawn there

    def results(self) -> list[Sampled]:
        """One per row. Waits for the device."""
        ids = self._tokens.tolist()
        logprobs = {} if self._raw is None else _logprobs(self._raw, ids, self._params)
        none = "the model gave no finite logit at this position"
        errors = [self._failed.get(i) or (none if ids[i] < 0 else None) for i in range(len(ids))]
        return [
            Sampled(ids[i], logprobs.get(i)) if error is None else Sampled(0, error=error)
            for i, error in enumerate(errors)
        ]


def start(logits: torch.Tensor, seqs: list[Sequence], eos: tuple[int, ...]) -> Draw:
    """Begin to draw the next token of ``seqs[i]`` from ``logits[i]``.

    Args:
        logits: ``[R, V]`` of a floating type; may be overwritten.
        eos: token ids that end a sequence unless it ignores them.
    """
    if wants_likeliest(seqs):
        return chosen(ops.likeliest(logits), seqs)
    params = [seq.state.sampling for seq in seqs]
    logits = logits.float()
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    raw = None
    if wanted:
        rows = to_device(torch.tensor(wanted), logits.device)
        raw = torch.log_softmax(logits[rows], dim=-1)
    failed = {i: seq.constraint.error() for i, seq in enumerate(seqs) if seq.constraint is not None}
    for i, seq in enumerate(seqs):
        if failed.get(i) is None:
            _adjust(logits[i], seq, eos)
    return Draw(ops.sample(logits, _rows(seqs, logits.device)), raw, params, failed)


def chosen(tokens: torch.Tensor, seqs: list[Sequence]) -> Draw:
    """The draw whose result is ``tokens``, as ``ops.likeliest`` gives them."""
    return Draw(tokens, None, [seq.state.sampling for seq in seqs], {})


def wants_likeliest(seqs: list[Sequence]) -> bool:
    """Whether the largest of the raw logits is all that any of them wants."""
    return all(_plainly_greedy(seq, seq.state.sampling) for seq in seqs)


def _plainly_greedy(seq: Sequence, p: SamplingParams) -> bool:
    return (
        p.temperature == 0
        and p.logprobs is None
        and p.repetition_penalty == 1.0
        and not (p.frequency_penalty or p.presence_penalty or p.logit_bias)
        and seq.constraint is None
        and seq.num_output >= p.min_tokens
    )


def sample(logits: torch.Tensor, seqs: list[Sequence], eos: tuple[int, ...]) -> list[Sampled]:
    """``start``, and wait."""
    return start(logits, seqs, eos).results()


def _rows(seqs: list[Sequence], device: torch.device) -> SamplingRows:
    params = [seq.state.sampling for seq in seqs]
    keys = [noise_key(p.seed, seq.num_tokens) for p, seq in zip(params, seqs, strict=True)]
    columns = (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]),
        torch.tensor(keys, dtype=torch.int64).int().view(-1, 2),
    )
    return SamplingRows(*(to_device(column, device) for column in columns))


def _adjust(row: torch.Tensor, seq: Sequence, eos: tuple[int, ...]) -> None:
    """Penalties, bias, grammar and ``min_tokens`` of one row, in place; most rows need none.

    Where the grammar is complete and nothing but an end may follow, ``min_tokens`` gives way.
    """
    p = seq.state.sampling
    if p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0:
        _penalise(row, seq, p)
    if p.logit_bias:
        ids = to_device(torch.tensor([token for token, _ in p.logit_bias]), row.device)
        bias = to_device(torch.tensor([bias for _, bias in p.logit_bias]), row.device)
        row.index_add_(0, ids, bias)
    allowed = None if seq.constraint is None else seq.constraint.allowed()[: len(row)]
    if seq.num_output < p.min_tokens:
        ends = [*p.stop_token_ids, *(() if p.ignore_eos else eos)]
        if allowed is None:
            ids = to_device(torch.tensor(ends, dtype=torch.int64), row.device)
            row.index_fill_(0, ids, -torch.inf)
        elif np.delete(allowed, ends).any():
            allowed[ends] = False
    if allowed is not None:
        hidden = to_device(torch.from_numpy(~allowed), row.device)
        row.masked_fill_(hidden, -torch.inf)


def _penalise(row: torch.Tensor, seq: Sequence, p: SamplingParams) -> None:
    if seq.penalties is None:
        seq.penalties = PenaltyCounts(len(row), row.device)
    counts: PenaltyCounts = seq.penalties
    counts.update(seq)
    if p.repetition_penalty != 1.0:
        factor = torch.where(row > 0, 1.0 / p.repetition_penalty, p.repetition_penalty)
        row.copy_(torch.where(counts.seen, row * factor, row))
    row -= p.frequency_penalty * counts.output + p.presence_penalty * (counts.output > 0)


def _logprobs(
    raw: torch.Tensor, ids: list[int], params: list[SamplingParams]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the raw logits at the rows that asked for them."""
    rows = [i for i, p in enumerate(params) if p.logprobs is not None]
    chosen = torch.tensor([max(ids[i], 0) for i in rows], device=raw.device)
    own = raw.gather(1, chosen[:, None])[:, 0].tolist()
    most = max(params[i].logprobs or 0 for i in rows)
    if most == 0:
        return {i: TokenLogprobs(own[j]) for j, i in enumerate(rows)}
    best, top = ranked_topk(raw, most)
    values, tokens = best.tolist(), top.tolist()
    result = {}
    for j, i in enumerate(rows):
        count = params[i].logprobs or 0
        pairs = zip(tokens[j][:count], values[j][:count], strict=True)
        result[i] = TokenLogprobs(own[j], tuple(pairs))
    return result
