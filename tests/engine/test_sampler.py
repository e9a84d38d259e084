"""Which token is drawn: golden noise, and an independent, plain reading of every parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import currently_in_test_context, given, reject, settings
from hypothesis import strategies as st
from mell_kernels.sampling import (
    GUMBEL_MAX,
    gumbel,
    gumbel_argmax,
    noise_key,
    ranked_topk,
    row_argmax,
)

from mell_ray.engine.sampler import Sampled, sample
from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import RequestState, SamplingParams

VOCAB = 600
EOS = (1, 2)
PROMPT = [5, 6, 7, 7]


def sequence(output: list[int] | None = None, **params: Any) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 50, **params})
    state = RequestState("r", list(PROMPT), sampling, output_token_ids=list(output or []))
    return Sequence(state, 4, 0)


def logits(seed: int, rows: int = 1, scale: float = 3.0, step: float | None = None) -> torch.Tensor:
    """``step``: round to multiples of it, so that ties are common."""
    values = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    return values if step is None else (values / step).round() * step


def draw(values: torch.Tensor, *seqs: Sequence) -> list[Sampled]:
    return sample(values.clone(), list(seqs), EOS)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "position", "key", "noise"),
    [
        (0, 0, (1293516399, -1492722385), [-0.309700, -0.529935, 0.333455, 0.420839, -1.004580]),
        (1, 0, (-929909490, 146079144), [2.489569, -0.669287, 0.977264, -0.082189, 0.267029]),
        (0, 1, (1949917470, 1581361928), [-1.305918, -0.112583, -1.660349, 0.269327, 0.644703]),
        (-5, 7, (2078680644, 1161256048), [0.000376, 0.823241, 1.962772, 2.082059, -0.086376]),
        (
            2**64 - 1,
            100,
            (-1950722131, -42143125),
            [0.622215, 1.433114, 1.444790, 0.358465, 3.107035],
        ),
    ],
)
def test_noise_never_changes(
    seed: int, position: int, key: tuple[int, int], noise: list[float]
) -> None:
    """Golden values: a change would alter every seeded answer, and break moves between versions."""
    assert noise_key(seed, position) == key
    ids = torch.tensor([0, 1, 2, 31_999, 151_935], dtype=torch.int32)
    drawn = gumbel(torch.tensor([key], dtype=torch.int32), ids)
    assert drawn.tolist() == pytest.approx(noise, abs=2e-6)


def test_the_hash_is_lowbias32() -> None:
    """The same noise from Python's own integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    key = noise_key(42, 9)
    ids = [0, 1, 77, 32_000, 250_001]
    expected = []
    for token in ids:
        x = mix((token * 0x9E3779B9 + key[0]) & 0xFFFFFFFF)
        x = mix(x ^ (key[1] & 0xFFFFFFFF))
        expected.append(-math.log(-math.log(((x >> 9) + 0.5) * 2.0**-23)))
    drawn = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor(ids, dtype=torch.int32))
    assert drawn.tolist() == pytest.approx(expected, rel=1e-5)


def test_noise_is_gumbel_and_independent_across_keys() -> None:
    ids = torch.arange(1 << 18, dtype=torch.int32)
    keys = torch.tensor([noise_key(1, p) for p in range(3)], dtype=torch.int32)
    noise = gumbel(keys[:, None], ids)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert noise.max() <= GUMBEL_MAX
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(3)).abs().max() < 0.01


@given(st.integers(0, 10_000), st.floats(0.05, 20))
@settings(max_examples=40, deadline=None)
def test_noise_left_out_could_not_have_won(seed: int, scale: float) -> None:
    scores = logits(seed, rows=3, scale=scale)
    scores[0, ::7] = -torch.inf
    keys = torch.tensor([noise_key(seed, p) for p in range(3)], dtype=torch.int32)
    everything = scores + gumbel(keys[:, None], torch.arange(VOCAB, dtype=torch.int32))
    assert gumbel_argmax(scores, keys).tolist() == everything.argmax(dim=-1).tolist()


def test_frequencies_follow_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    keys = torch.tensor([noise_key(3, p) for p in range(20_000)], dtype=torch.int32)
    counts = gumbel_argmax(scores.contiguous(), keys).bincount(minlength=4) / 20_000
    assert (counts - torch.softmax(scores[0], dim=0)).abs().max() < 0.012


def test_ranked_topk_orders_ties_by_id() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]])
    values, ids = ranked_topk(scores, 3)
    assert ids.tolist() == [[1, 2, 4]]
    assert values.tolist() == [[3.0, 3.0, 3.0]]


# --- an independent reading of the parameters ----------------------------------------------------


def plainly(row: torch.Tensor, seq: Sequence) -> int:
    """Slow, in float64, with loops; the definition."""
    p = seq.state.sampling
    x = row.double().clone()
    output = seq.state.output_token_ids
    for token in set(PROMPT) | set(output):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    for token, bias in p.logit_bias:
        x[token] += bias
    if len(output) < p.min_tokens:
        for token in (*p.stop_token_ids, *(() if p.ignore_eos else EOS)):
            x[token] = -math.inf
    if p.temperature == 0:
        return int(x.argmax())
    x = x / p.temperature
    order = sorted(range(VOCAB), key=lambda token: (-x[token].item(), token))
    if p.top_k:
        order = order[: p.top_k]
    probabilities = torch.softmax(x[order], dim=0)
    before, kept = 0.0, []
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        # Where a token's mass ends exactly at top_p, rounding decides whether the next is in.
        if abs(before - p.top_p) < 1e-6 and currently_in_test_context():
            reject()
        if before < p.top_p:
            kept.append(token)
        before += probability
    best = x[order[0]].item()
    if p.min_p:
        kept = [token for token in kept if x[token].item() >= best + math.log(p.min_p)]
    key = torch.tensor([noise_key(p.seed, seq.num_tokens)], dtype=torch.int32)
    noise = gumbel(key, torch.tensor(kept, dtype=torch.int32)).double()
    return kept[int((x[kept] + noise).argmax())]


PARAMS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7])},
    optional={
        "top_k": st.sampled_from([1, 2, 20, 256, 599, 600, 5000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([0.01, 0.2, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.7]),
        "presence_penalty": st.sampled_from([-0.5, 1.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "logit_bias": st.just(((3, 4.0), (9, -100.0), (3, 1.0))),
        "min_tokens": st.sampled_from([1, 4]),
        "stop_token_ids": st.just((11, 12)),
        "ignore_eos": st.booleans(),
    },
)


@given(
    params=st.lists(PARAMS, min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    output=st.lists(st.sampled_from([5, 8, 9, 300]), max_size=6),
    step=st.sampled_from([None, 0.5]),
)
@settings(max_examples=120, deadline=None)
def test_every_parameter_means_what_it_says(
    params: list[dict[str, Any]], seed: int, output: list[int], step: float | None
) -> None:
    """Any mixture of rows, also with many equal logits, gives what each row alone would give."""
    values = logits(seed, rows=len(params), step=step)
    seqs = [sequence(output, **p) for p in params]
    drawn = draw(values, *seqs)
    assert [result.token_id for result in drawn] == [
        plainly(row, seq) for row, seq in zip(values, seqs, strict=True)
    ]


def test_flat_distributions_beyond_the_first_candidates() -> None:
    values = torch.zeros(1, VOCAB)
    seq = sequence(top_p=0.9, seed=3)
    assert draw(values, seq)[0].token_id == plainly(values[0], seq)


def test_penalties_follow_the_tokens_as_they_come() -> None:
    """Counts kept from step to step equal counts taken from scratch."""
    seq = sequence(temperature=0.0, frequency_penalty=0.4, repetition_penalty=1.2)
    values = logits(1, scale=0.5)
    for _ in range(12):
        (result,) = draw(values, seq)
        assert result.token_id == plainly(
            values[0],
            sequence(
                seq.state.output_token_ids,
                temperature=0.0,
                frequency_penalty=0.4,
                repetition_penalty=1.2,
            ),
        )
        seq.append(result.token_id)
    assert len(set(seq.state.output_token_ids)) > 4


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, [40, 30, 50]] = 2.0
    assert draw(values, sequence(temperature=0.0))[0].token_id == 30


def test_a_tiny_temperature_is_greedy() -> None:
    values = logits(5)
    tiny = sequence(temperature=1e-30)
    assert draw(values, tiny)[0].token_id == int(values.argmax())


def test_another_position_or_seed_draws_anew() -> None:
    values = logits(6, scale=0.1)
    base = [draw(values, sequence(seed=1))[0].token_id]
    others = [draw(values, sequence(seed=s))[0].token_id for s in range(2, 12)]
    later = [draw(values, sequence([9] * n, seed=1))[0].token_id for n in range(1, 11)]
    assert len(set(base + others)) > 5
    assert len(set(base + later)) > 5


# --- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    values = logits(8, rows=3)
    expected = torch.log_softmax(values.double(), dim=-1)
    plain, own, full = draw(
        values,
        sequence(seed=1),
        sequence(seed=2, temperature=0.2, logprobs=0, logit_bias=((5, 50.0),)),
        sequence(seed=3, top_k=5, logprobs=4, presence_penalty=2.0),
    )
    assert plain.logprobs is None
    assert own.token_id == 5
    assert own.logprobs is not None
    assert own.logprobs.top == ()
    assert own.logprobs.logprob == pytest.approx(expected[1, 5].item(), abs=1e-5)
    assert full.logprobs is not None
    assert full.logprobs.logprob == pytest.approx(expected[2, full.token_id].item(), abs=1e-5)
    best = expected[2].topk(4)
    assert [token for token, _ in full.logprobs.top] == best.indices.tolist()
    assert [value for _, value in full.logprobs.top] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )


def test_alternatives_that_tie_come_in_order_of_id() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, 500] = 1.0
    (result,) = draw(values, sequence(temperature=0.0, logprobs=3))
    assert result.logprobs is not None
    assert [token for token, _ in result.logprobs.top] == [500, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_finite_logits_is_an_error_of_that_row(bad: float) -> None:
    values = logits(9, rows=2)
    values[0, 17] = bad
    broken, healthy = draw(values, sequence(seed=1), sequence(seed=1))
    assert broken.error is not None
    assert healthy.error is None
    assert healthy.token_id == plainly(values[1], sequence(seed=1))


def test_row_argmax_settles_ties_and_nan_as_torch_does() -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [[1.0, 3.0, 3.0], [-inf, -inf, -inf], [1.0, nan, inf], [nan, nan, 0.0], [0.0, inf, inf]]
    )
    assert row_argmax(rows).tolist() == rows.argmax(dim=-1).tolist() == [1, 0, 1, 0, 1]
    torch.manual_seed(0)
    many = torch.randn(40, 500).half().float()
    assert torch.equal(row_argmax(many), many.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_argmax_of_16_bits_is_that_of_32(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [
            [1.0, 3.0, 3.0, 0.0],
            [-3.0, -2.0, -2.0, -inf],
            [-0.0, 0.0, -1.0, -inf],
            [-1.0, -0.0, 0.0, -5.0],
            [-inf, -inf, -inf, -inf],
            [1.0, inf, inf, 0.0],
            [1.0, nan, inf, nan],
        ]
    ).to(dtype)
    negative_nan = rows[:1].clone()
    negative_nan.view(torch.int16)[0, 3] = -1
    torch.manual_seed(0)
    for some in (rows[:1], rows[1:2], rows[:6], rows, negative_nan, torch.randn(40, 500).to(dtype)):
        assert torch.equal(row_argmax(some), some.float().argmax(dim=-1))
