"""The learning rate is a function of the training step alone."""

from __future__ import annotations

import pytest
import torch

from dapo_mcore.actor.optimizer import LearningRate
from dapo_mcore.config import OptimConfig


def rates(total_steps: int, **options: object) -> list[float]:
    optim = OptimConfig(lr=0.1, **options)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    learning_rate = LearningRate(optimizer, optim, total_steps)
    found = []
    for step in range(total_steps):
        learning_rate.set_step(step)
        assert optimizer.param_groups[0]["lr"] == learning_rate.value
        found.append(learning_rate.value)
    return found


def test_constant() -> None:
    assert rates(3) == [0.1, 0.1, 0.1]


def test_warm_up_starts_above_zero_and_ends_at_the_full_rate() -> None:
    assert rates(6, lr_warmup_steps=4) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    assert rates(2, lr_warmup_steps=4) == pytest.approx([0.025, 0.05])


def test_linear_decay_reaches_its_end_only_after_the_last_step() -> None:
    assert rates(4, lr_decay_style="linear") == pytest.approx([0.08, 0.06, 0.04, 0.02])
    assert rates(4, lr_decay_style="linear", min_lr=0.05) == pytest.approx([0.09, 0.08, 0.07, 0.06])


def test_cosine_decay_after_warm_up() -> None:
    expected = [0.05, 0.1, *(0.05 * (1 + torch.tensor(torch.pi * k / 3).cos().item()) for k in (1, 2))]
    assert rates(4, lr_warmup_steps=2, lr_decay_style="cosine") == pytest.approx(expected)
