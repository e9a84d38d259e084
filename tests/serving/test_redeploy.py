"""A new configuration reaches the replicas."""

from __future__ import annotations

from mell_ray.builtin import MODEL_ID


def test_replicas_with_old_settings_are_replaced(deploy) -> None:
    app = deploy("again", replicas=(1, 2), engine={"num_gpu_blocks_override": 40})
    (old,) = app.wait_ready(1)
    deploy("again", replicas=(1, 2), engine={"num_gpu_blocks_override": 50})

    def renewed(state: dict) -> bool:
        return [r["capacity_blocks"] for r in state["replicas"]] == [50]

    app.wait(renewed, "the old replica is still there")
    assert old not in [r["id"] for r in app.state()["replicas"]]
    assert app.client.completions.create(model=MODEL_ID, prompt="It was", max_tokens=4).choices
