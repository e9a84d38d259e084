"""Every model family that the engine takes, against transformers' own generate."""

from __future__ import annotations

import pytest

from mell_ray.engine import Engine, load_model
from tests.engine.families import FAMILIES
from tests.engine.support import (
    Client,
    build,
    drain,
    generate,
    prompts,
    request,
    small_config,
    step,
)
from tests.engine.test_migration import move_kv, move_tokens


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_equals_generate(name: str) -> None:
    """Ragged batch, chunked prefill, a prefix hit, and two requests that move while they decode:
    every token is the one that transformers' generate gives. Run on each upgrade of transformers
    this tells which families still work."""
    model = build(FAMILIES[name]())
    model.set_attn_implementation("eager")
    asked = prompts(4, seed=1, longest=30)
    asked.append([*max(asked, key=len)[:13], 5, 6, 7])
    expected = [generate(model, prompt, 16) for prompt in asked]
    assert len({token for tokens in expected for token in tokens}) > 10
    config = small_config(max_num_batched_tokens=7, max_num_seqs=6)
    loaded = load_model(model, config)
    home, away, client = Engine(loaded, config), Engine(loaded, config), Client()
    for i, prompt in enumerate(asked[:-1]):
        home.add(request(f"r{i}", prompt, 16, arrival_s=i))
    while not client.tokens.get("r2"):
        step([home], client)
    home.add(request("r4", asked[-1], 16, arrival_s=9))
    move_kv(home, away, "r2", client, stages=2)
    step([home, away], client)
    move_tokens(home, away, "r3", client, stages=1)
    assert len(away.sequences()) == 2
    drain([home, away], client)
    assert [client.tokens[f"r{i}"] for i in range(5)] == expected
    assert home.stats().prefix_hit_tokens >= 12
