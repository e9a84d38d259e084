"""From logits to tokens: penalties, bias, grammar, temperature, top-k, top-p, min-p, noise, in that
order.

Nothing here keeps state between steps that could not be derived from a sequence's tokens, so a
request that moves needs to carry none. Work that only some parameters need is done only for the
rows that ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from mell_kernels.sampling import gumbel, gumbel_argmax, noise_key, ranked_topk

from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import SamplingParams, TokenLogprobs

# How many of the likeliest tokens are looked at first where top_p alone limits the choice.
_TOP_P_CANDIDATES = 256


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
        new_output = new[max(0, len(seq.state.prompt_token_ids) - self._upto) :]
        self._upto = seq.num_tokens
        self.seen[new.to(self.seen.device)] = True
        ones = torch.ones(len(new_output), device=self.output.device)
        self.output.index_add_(0, new_output.to(self.output.device), ones)


def sample(logits: torch.Tensor, seqs: list[Sequence], eos: tuple[int, ...]) -> list[Sampled]:
    """Draw the next token of ``seqs[i]`` from ``logits[i]``.

    Args:
        logits: ``[R, V]`` float32; overwritten.
        eos: token ids that end a sequence unless it ignores them.
    """
    params = [seq.state.sampling for seq in seqs]
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
    failed = {i: seq.constraint.error() for i, seq in enumerate(seqs) if seq.constraint is not None}
    for i, seq in enumerate(seqs):
        if failed.get(i) is None:
            _adjust(logits[i], seq, eos)
    tokens = logits.argmax(dim=-1)
    usable = logits.gather(1, tokens[:, None])[:, 0].isfinite().tolist()
    drawn = [i for i, p in enumerate(params) if p.temperature > 0 and usable[i]]
    if drawn:
        _draw(logits, seqs, drawn, tokens)
    ids = tokens.tolist()
    logprobs = {} if raw is None else _logprobs(raw, wanted, ids, params)
    none = "the model gave no finite logit at this position"
    errors = [failed.get(i) or (None if usable[i] else none) for i in range(len(seqs))]
    return [
        Sampled(ids[i], logprobs.get(i)) if error is None else Sampled(0, error=error)
        for i, error in enumerate(errors)
    ]


def _adjust(row: torch.Tensor, seq: Sequence, eos: tuple[int, ...]) -> None:
    """Penalties, bias, grammar and ``min_tokens`` of one row, in place; most rows need none.

    Where the grammar is complete and nothing but an end may follow, ``min_tokens`` gives way.
    """
    p = seq.state.sampling
    if p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1.0:
        _penalise(row, seq, p)
    if p.logit_bias:
        ids = torch.tensor([token for token, _ in p.logit_bias], device=row.device)
        bias = torch.tensor([bias for _, bias in p.logit_bias], device=row.device)
        row.index_add_(0, ids, bias)
    allowed = None if seq.constraint is None else seq.constraint.allowed()[: len(row)]
    if seq.num_output < p.min_tokens:
        ends = [*p.stop_token_ids, *(() if p.ignore_eos else eos)]
        if allowed is None:
            row[ends] = -torch.inf
        elif np.delete(allowed, ends).any():
            allowed[ends] = False
    if allowed is not None:
        row.masked_fill_(torch.from_numpy(~allowed).to(row.device), -torch.inf)


def _penalise(row: torch.Tensor, seq: Sequence, p: SamplingParams) -> None:
    if seq.penalties is None:
        seq.penalties = PenaltyCounts(len(row), row.device)
    counts: PenaltyCounts = seq.penalties
    counts.update(seq)
    if p.repetition_penalty != 1.0:
        factor = torch.where(row > 0, 1.0 / p.repetition_penalty, p.repetition_penalty)
        row.copy_(torch.where(counts.seen, row * factor, row))
    row -= p.frequency_penalty * counts.output + p.presence_penalty * (counts.output > 0)


def _draw(
    logits: torch.Tensor, seqs: list[Sequence], drawn: list[int], tokens: torch.Tensor
) -> None:
    """Overwrite ``tokens`` of the rows ``drawn`` by tokens drawn with keyed noise."""
    params = [seqs[i].state.sampling for i in drawn]
    keys = torch.tensor(
        [noise_key(seqs[i].state.sampling.seed, seqs[i].num_tokens) for i in drawn],
        dtype=torch.int64,
        device=logits.device,
    ).int()
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    scores = logits[drawn]
    # Relative to the maximum, so that no temperature however small overflows to infinity.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    cut = [j for j, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    full = [j for j, p in enumerate(params) if not (p.top_k > 0 or p.top_p < 1.0)]
    result = tokens.new_empty(len(drawn))
    if full:
        kept = _min_p(scores[full], [params[j] for j in full])
        result[full] = gumbel_argmax(kept, keys[full])
    if cut:
        result[cut] = _draw_cut(scores[cut], [params[j] for j in cut], keys[cut])
    tokens[drawn] = result


def _min_p(scores: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    if not any(p.min_p > 0 for p in params):
        return scores
    least = torch.tensor([p.min_p for p in params], device=scores.device).log()
    bound = scores.amax(dim=-1) + least
    return scores.masked_fill(scores < bound[:, None], -torch.inf)


def _draw_cut(
    scores: torch.Tensor, params: Rows[SamplingParams], keys: torch.Tensor
) -> torch.Tensor:
    """Rows limited by top_k or top_p: noise only on what those leave."""
    vocab = scores.shape[1]
    count = min(vocab, max(p.top_k if p.top_k > 0 else _TOP_P_CANDIDATES for p in params))
    values, ids, complete = _keep(scores, params, count)
    noisy = values + gumbel(keys[:, None, :], ids.int())
    result = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    rest = (~complete).nonzero()[:, 0]
    if len(rest) > 0:
        some = rest.tolist()
        values, ids, _ = _keep(scores[some], [params[j] for j in some], vocab)
        noisy = values + gumbel(keys[some, None, :], ids.int())
        result[some] = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    return result


def _keep(
    scores: torch.Tensor, params: Rows[SamplingParams], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` best scores and ids of each row, ``-inf`` where a limit removes them, and
    whether that is all that the row's limits leave."""
    vocab, device = scores.shape[1], scores.device
    values, ids = ranked_topk(scores, count)
    top_k = torch.tensor([min(p.top_k, vocab) or vocab for p in params], device=device)
    keep = torch.arange(count, device=device) < top_k[:, None]
    # top_p sees the distribution that top_k left; without top_k that is the whole vocabulary.
    total = values.masked_fill(~keep, -torch.inf).logsumexp(dim=-1)
    if count < vocab and any(p.top_k == 0 for p in params):
        total = torch.where(top_k <= count, total, scores.logsumexp(dim=-1))
    probabilities = (values - total[:, None]).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    keep &= (before < top_p) | (top_p == 1.0)
    keep[:, 0] = True
    kept = _min_p(values.masked_fill(~keep, -torch.inf), params)
    return kept, ids, (top_k <= count) | (kept[:, -1] == -torch.inf)


def _logprobs(
    raw: torch.Tensor, rows: list[int], ids: list[int], params: list[SamplingParams]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the raw logits at the rows that asked for them."""
    chosen = torch.tensor([ids[i] for i in rows], device=raw.device)
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
