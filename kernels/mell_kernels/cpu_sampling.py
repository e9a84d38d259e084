"""From logits to tokens in plain torch: temperature, top-k, top-p, min-p, and Gumbel noise.

Work that only some parameters need is done only for the rows that ask for it.
"""

from __future__ import annotations

import numpy as np
import torch

from mell_kernels.rows import SamplingRows
from mell_kernels.sampling import gumbel, gumbel_argmax, ranked_topk, row_argmax

# How many of the likeliest tokens are looked at first where top_p alone limits the choice.
_TOP_P_CANDIDATES = 256


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """See ``reference.sample``."""
    tokens = row_argmax(logits)
    usable = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    drawn = ((rows.temperature > 0) & usable).nonzero()[:, 0]
    if len(drawn) == len(logits):
        tokens = _draw(logits, rows)
    elif len(drawn) > 0:
        tokens[drawn] = _draw(logits[drawn], rows.select(drawn))
    return tokens.masked_fill(~usable, -1)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """See ``ops.likeliest``. numpy's calls are shorter than torch's."""
    ids = row_argmax(logits)
    best = logits[torch.arange(len(ids)), ids].float().numpy()
    usable = np.isfinite(best)
    return ids if usable.all() else ids.masked_fill_(torch.from_numpy(~usable), -1)


def _draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    # Relative to the maximum, so that no temperature however small overflows to infinity.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / rows.temperature[:, None]
    limited = (rows.top_k > 0) | (rows.top_p < 1.0)
    cut, full = limited.nonzero()[:, 0], (~limited).nonzero()[:, 0]
    result = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(full) > 0:
        some = rows.select(full)
        result[full] = gumbel_argmax(_min_p(scores[full], some), some.keys)
    if len(cut) > 0:
        result[cut] = _draw_cut(scores[cut], rows.select(cut))
    return result


def _min_p(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    if not (rows.log_min_p > -torch.inf).any():
        return scores
    bound = scores.amax(dim=-1) + rows.log_min_p
    return scores.masked_fill(scores < bound[:, None], -torch.inf)


def _draw_cut(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Rows limited by top_k or top_p: noise only on what those leave."""
    vocab = scores.shape[1]
    wanted = torch.where(rows.top_k > 0, rows.top_k, _TOP_P_CANDIDATES)
    values, ids, complete = _keep(scores, rows, min(vocab, int(wanted.max())))
    noisy = values + gumbel(rows.keys[:, None, :], ids.int())
    result = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    rest = (~complete).nonzero()[:, 0]
    if len(rest) > 0:
        some = rows.select(rest)
        values, ids, _ = _keep(scores[rest], some, vocab)
        noisy = values + gumbel(some.keys[:, None, :], ids.int())
        result[rest] = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    return result


def _keep(
    scores: torch.Tensor, rows: SamplingRows, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` best scores and ids of each row, ``-inf`` where a limit removes them, and
    whether that is all that the row's limits leave."""
    vocab = scores.shape[1]
    values, ids = ranked_topk(scores, count)
    top_k = torch.where(rows.top_k > 0, rows.top_k, vocab).clamp(max=vocab)[:, None]
    keep = torch.arange(count, device=scores.device) < top_k
    # top_p sees the distribution that top_k left; without top_k that is the whole vocabulary.
    total = values.masked_fill(~keep, -torch.inf).logsumexp(dim=-1)
    if count < vocab and (rows.top_k == 0).any():
        total = torch.where(top_k[:, 0] <= count, total, scores.logsumexp(dim=-1))
    probabilities = (values - total[:, None]).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = rows.top_p[:, None]
    keep &= (before < top_p) | (top_p == 1.0)
    keep[:, 0] = True
    kept = _min_p(values.masked_fill(~keep, -torch.inf), rows)
    return kept, ids, (top_k[:, 0] <= count) | (kept[:, -1] == -torch.inf)
