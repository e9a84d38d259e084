"""What a benchmark runs is what its options say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mell_ray.bench.workload import BenchRequest, LengthRange, load_requests, random_requests
from mell_ray.errors import ConfigError


def test_lengths_are_one_number_or_a_range() -> None:
    assert LengthRange.parse("128", "--input-len") == LengthRange(128, 128)
    assert LengthRange.parse("64:128", "--output-len") == LengthRange(64, 128)


@pytest.mark.parametrize("text", ["", "0", "x", "5:4", "1:2:3", "1:", "-3"])
def test_other_lengths_are_refused_by_the_option_s_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        LengthRange.parse(text, "--output-len")


def test_requests_keep_to_their_ranges_and_depend_on_the_seed_alone() -> None:
    inputs, outputs = LengthRange(3, 9), LengthRange(2, 4)
    requests = random_requests(200, inputs, outputs, vocab_size=50, seed=1)
    assert {len(r.prompt_token_ids) for r in requests} == set(range(3, 10))
    assert {r.output_len for r in requests} == {2, 3, 4}
    assert all(0 <= token < 50 for r in requests for token in r.prompt_token_ids)
    assert requests == random_requests(200, inputs, outputs, vocab_size=50, seed=1)
    assert requests != random_requests(200, inputs, outputs, vocab_size=50, seed=2)


def test_requests_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([{"prompt_token_ids": [4, 5], "output_len": 7}]))
    assert load_requests(path) == [BenchRequest([4, 5], 7)]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "[1]", '[{"prompt_token_ids": [], "output_len": 1}]', '[{"output_len": 1}]'],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "requests.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="--requests"):
        load_requests(path)
