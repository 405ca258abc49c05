"""The whole program with engines in Ray actors: each step's groups are sampled during the step before."""

from __future__ import annotations

import json

from tests.e2e.torchrun import rows, train
from tools.tiny.model import random_model, save_folder, tiny_config

STEPS = 3
OVERLAP = (
    "trainer.loop=one_step_off",
    "rollout.backend=ray",
    "actor.rollout_correction.rollout_is=token",
    f"trainer.total_training_steps={STEPS}",
)


def versions(file):
    """Of the weights that sampled these responses."""
    return {json.loads(line)["version"] for line in file.read_text().splitlines()}


def test_batches_are_one_step_stale_but_the_first_and_what_validation_sees_is_not(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), model)
    result = train(model, out, *OVERLAP)
    assert result.returncode == 0, result.stderr
    metrics = rows(out)
    assert list(metrics) == [0, 1, 2, 3]
    assert all(metrics[step]["actor/grad_norm"] > 0 for step in (1, 2, 3))
    sampled = {step: versions(out / "rollouts" / f"train_{step:06d}.jsonl") for step in (1, 2, 3)}
    assert sampled == {1: {0}, 2: {0}, 3: {1}}
    assert {step: versions(out / "rollouts" / f"val_{step:06d}.jsonl") for step in (0, 2)} == {0: {0}, 2: {2}}
    resumed = train(model, out, *OVERLAP, f"trainer.total_training_steps={STEPS + 1}")
    assert resumed.returncode == 0, resumed.stderr
    assert versions(out / "rollouts" / "train_000004.jsonl") == {STEPS}
