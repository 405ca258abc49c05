"""Another member of the family as a whole program, its memory in turns with the engine's."""

from __future__ import annotations

import math

from tests.e2e.torchrun import rows, train
from tools.tiny.model import random_model, save_folder, tiny_config

OPTIONS = (
    "algorithm.adv_estimator=rloo",
    "actor.loss_mode=gspo",
    "actor.loss_agg_mode=seq-mean-token-mean",
    "actor.clip_ratio_low=3e-4",
    "actor.clip_ratio_high=4e-4",
    "actor.use_kl_loss=true",
    "actor.kl_loss_coef=0.01",
    "actor.rollout_correction.rollout_is=sequence",
    "actor.rollout_correction.rollout_rs=seq_mean_k1",
    "actor.optim.lr=1e-2",
    "actor.megatron.param_offload=true",
    "actor.megatron.grad_offload=true",
    "actor.megatron.optimizer_offload=true",
    "ref.param_offload=true",
    "trainer.total_training_steps=2",
    "trainer.save_freq=0",
)
OF_ITS_OPTIONS = {
    "actor/kl_ref",  # the reference model has scored
    "actor/is_weight",
    "actor/is_outside_fraction",
    "actor/rejected_fraction",
    "actor/mismatch_abs",
    "actor/clip_fraction_high",
    "actor/clip_fraction_low",
    "actor/grad_norm",
}


def test_gspo_with_leave_one_out_reference_and_correction_trains_and_ends_well(tmp_path):
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), tmp_path / "model")
    result = train(tmp_path / "model", tmp_path / "out", *OPTIONS)
    assert result.returncode == 0, result.stderr
    metrics = rows(tmp_path / "out")
    assert list(metrics) == [0, 1, 2]
    assert all(math.isfinite(value) for row in metrics.values() for value in row.values())
    assert metrics[1].keys() & metrics[2].keys() >= OF_ITS_OPTIONS
    assert 0 < metrics[1]["actor/kl_ref"] < metrics[2]["actor/kl_ref"]  # the policy leaves where it came from
    for step in (1, 2):  # in fp32 the engine samples from the policy that is trained
        assert 0 < metrics[step]["actor/mismatch_abs"] < 1e-4
    assert metrics[1]["actor/rejected_fraction"] == metrics[1]["actor/clip_fraction_dual"] == 0
    assert metrics[1]["actor/clip_fraction_high"] + metrics[1]["actor/clip_fraction_low"] > 0
    assert "val/accuracy" in metrics[0].keys() & metrics[2].keys()
    assert (tmp_path / "out" / "hf_model" / "model.safetensors").is_file()
