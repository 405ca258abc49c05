import math
from dataclasses import replace

import pytest
import torch

from dapo_mcore.algo import mismatch
from dapo_mcore.types import TrainBatch

LENGTHS = torch.tensor([2, 3, 1])
RHO = torch.tensor([4.0, 0.51, 1.0, 1.5, 1.99, 0.1])  # of the tokens; the third is masked
MASK = torch.tensor([True, True, False, True, True, True])
ADVANTAGES = torch.tensor([1.0, -1.0, math.nan, 2.0, 1.0, -3.0])
BATCH = TrainBatch(
    torch.zeros(6, dtype=torch.int64), 0 * LENGTHS, LENGTHS, MASK, ADVANTAGES,
    rollout_logprobs=torch.full((6,), -2.0), old_logprobs=RHO.log() - 2.0,
)  # fmt: skip
TRAINED = MASK.nonzero()[:, 0]


@pytest.mark.parametrize(
    ("level", "lower", "upper", "weights", "outside"),
    [
        (mismatch.of_token, 0.0, 1.9, [1.9, 0.51, 1.5, 1.9, 0.1], 2),  # TIS
        (mismatch.of_token, 0.3, 1.9, [0.0, 0.51, 1.5, 0.0, 0.0], 3),  # IcePop
        (mismatch.of_sequence, 0.0, 2.5, [2.04, 2.04, 2.5, 2.5, 0.1], 2),  # products 2.04, 2.985, 0.1
        (mismatch.of_sequence, 0.3, 2.5, [2.04, 2.04, 0.0, 0.0, 0.0], 3),
    ],
)
def test_importance_weights_scale_the_advantage_and_leave_the_denominator(level, lower, upper, weights, outside):
    corrected, metrics = mismatch.importance_weighted(BATCH, level, lower, upper)
    expected = [w * a for w, a in zip(weights, ADVANTAGES[TRAINED].tolist(), strict=True)]
    assert corrected.advantages[TRAINED].tolist() == pytest.approx(expected, rel=1e-6)
    assert corrected.num_loss_tokens == 5
    assert metrics["actor/is_weight"].value == pytest.approx(sum(weights) / 5)
    assert metrics["actor/is_outside_fraction"].value == outside / 5


@pytest.mark.parametrize(
    ("level", "lower", "upper", "kept"),
    [
        (mismatch.of_token, 0.25, 2.5, [1, 3, 4]),
        (mismatch.of_sequence, 0.25, 2.5, [0, 1]),
        (mismatch.of_sequence_mean, 0.25, 1.6, [0, 1]),  # geometric means 1.43, 1.73, 0.1
        (mismatch.of_sequence_mean, 0.25, 1.8, [0, 1, 3, 4]),
        (mismatch.of_token, 0.9, 1.1, []),
    ],
)
def test_rejected_tokens_leave_the_mask_and_with_it_the_denominator(level, lower, upper, kept):
    corrected, metrics = mismatch.rejected(BATCH, level, lower, upper)
    assert corrected.loss_mask.nonzero()[:, 0].tolist() == kept
    assert corrected.num_loss_tokens == len(kept)
    assert metrics["actor/rejected_fraction"].value == pytest.approx(1 - len(kept) / 5)


def test_what_masked_tokens_hold_reaches_nothing():
    dirty = replace(BATCH, old_logprobs=BATCH.old_logprobs.masked_fill(~MASK, math.nan))
    for level in (mismatch.of_token, mismatch.of_sequence):
        clean, found = (mismatch.importance_weighted(b, level, 0.0, 2.0) for b in (BATCH, dirty))
        assert torch.equal(clean[0].advantages, found[0].advantages)
        assert clean[1] == found[1]
        assert torch.equal(mismatch.rejected(dirty, level, 0.5, 2.0)[0].loss_mask,
                           mismatch.rejected(BATCH, level, 0.5, 2.0)[0].loss_mask)  # fmt: skip


def test_the_gap_is_measured_on_the_trained_tokens():
    metrics = mismatch.gap_metrics(BATCH.old_logprobs, BATCH.rollout_logprobs, MASK)
    rho = [4.0, 0.51, 1.5, 1.99, 0.1]
    logs = [math.log(r) for r in rho]
    assert {name: ratio.value for name, ratio in metrics.items()} == pytest.approx(
        {
            "actor/mismatch_abs": sum(map(abs, logs)) / 5,
            "actor/mismatch_max": math.log(10),
            "actor/mismatch_kl": sum(r - 1 - x for r, x in zip(rho, logs, strict=True)) / 5,
            "actor/mismatch_beyond_2x": 2 / 5,  # 4 and 0.1
            "actor/mismatch_effective_sample_size": sum(rho) ** 2 / sum(r * r for r in rho) / 5,
        },
        rel=1e-5,
    )


def test_engine_and_trainer_that_agree_have_no_gap():
    metrics = mismatch.gap_metrics(BATCH.rollout_logprobs, BATCH.rollout_logprobs, MASK)
    assert {name: ratio.value for name, ratio in metrics.items()} == {
        "actor/mismatch_abs": 0.0,
        "actor/mismatch_max": 0.0,
        "actor/mismatch_kl": 0.0,
        "actor/mismatch_beyond_2x": 0.0,
        "actor/mismatch_effective_sample_size": 1.0,
    }
