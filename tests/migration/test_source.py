"""The source's half: what was read from blocks that were lost meanwhile is never handed over."""

from __future__ import annotations

import pytest

from mell_ray.errors import MigrationError
from mell_ray.migration.source import MigrationSource
from mell_ray.migration.types import MigrationOrder
from tests.engine.support import engine, prompts, request

PROMPT = prompts(1, seed=4)[0][:1] * 6


@pytest.mark.parametrize("mode", ["kv", "hybrid", "token"])
def test_preempted_while_its_blocks_were_read(mode: str) -> None:
    subject = engine(num_gpu_blocks_override=12, enable_prefix_caching=False)
    for i in range(2):
        subject.add(request(f"r{i}", PROMPT, 30, arrival_s=i, ignore_eos=True))
    source = MigrationSource(timeout_s=60)
    subject.step()
    source.begin(subject, MigrationOrder("m", "r1", "a", "b", mode, "test"))
    while not subject.stats().preemptions:
        subject.step()
    while subject.progress("r1")[1] < len(PROMPT):
        subject.step()  # it has blocks again, and as many as before
    if mode == "token":
        frozen, _ = source.freeze(subject, "m", 0)
        assert frozen.state.request_id == "r1"
    else:
        with pytest.raises(MigrationError, match="preempted"):
            source.freeze(subject, "m", 1)
        source.thaw(subject, "m")
        while subject.has_work():  # goes on where it is
            subject.step()
    subject.check()
