from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mell_ray.replay.prompts import PromptMaker
from mell_ray.replay.types import Job

MAKER = PromptMaker(256, 4096, seed=0)
BLOCK = 16
CHAINS = st.lists(st.sampled_from("abc"), max_size=5).map(tuple)


def job(number: int, tokens: int, hashes: tuple[str, ...] = (), block: int = BLOCK) -> Job:
    return Job(number, 0.0, tokens, 1, hashes, block)


def common(first: list[int], second: list[int]) -> int:
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))


@given(st.integers(1, 100), CHAINS, st.integers(0, 5))
def test_prompts_have_the_asked_length_and_vocabulary(
    tokens: int, hashes: tuple[str, ...], seed: int
) -> None:
    made = PromptMaker(300, 310, seed).tokens(job(0, tokens, hashes))
    assert len(made) == tokens
    assert all(300 <= token < 310 for token in made)


@given(CHAINS, CHAINS, st.integers(1, 100), st.integers(1, 100))
def test_prompts_share_exactly_the_blocks_whose_hashes_agree(
    first: tuple[str, ...], second: tuple[str, ...], one: int, other: int
) -> None:
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    expected = min(shared * BLOCK, one, other)
    found = common(MAKER.tokens(job(1, one, first)), MAKER.tokens(job(2, other, second)))
    assert (
        expected <= found <= expected + 2
    )  # unequal draws may agree by chance, for long they don't


def test_prompts_depend_on_seed_and_request_only() -> None:
    again = PromptMaker(256, 4096, seed=0)
    assert MAKER.tokens(job(7, 50)) == again.tokens(job(7, 50))
    assert MAKER.tokens(job(7, 50)) != MAKER.tokens(job(8, 50))
    assert MAKER.tokens(job(7, 50)) != PromptMaker(256, 4096, seed=1).tokens(job(7, 50))


def test_same_block_after_another_start_is_another_text() -> None:
    first, second = (MAKER.tokens(job(1, 2 * BLOCK, (start, "x"))) for start in "ab")
    assert first[BLOCK:] != second[BLOCK:]
