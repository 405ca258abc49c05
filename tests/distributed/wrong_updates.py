"""Updates that are wrong in the ways the certificate is for, on the ranks of a layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dapo_mcore.actor import actor as actor_module
from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.loss_head import policy_loss_head
from dapo_mcore.actor.objective import Objective
from dapo_mcore.actor.router_losses import Weights
from dapo_mcore.actor.vision import model as vision_model
from dapo_mcore.actor.vision.features import _SumOverRanks
from dapo_mcore.actor.vision.tower import build_tower
from dapo_mcore.types import TrainBatch
from tools.certificate.cases import Case
from tools.certificate.measure import Measured, laid_out, measure

MICRO_BATCHES = 3  # of the certificate's uneven batch on two data-parallel ranks
exact_update, exact_total = Actor.update, Weights.total


def mask_dropped() -> AbstractContextManager[Any]:
    def update(self: Actor, batch: TrainBatch) -> Any:
        return exact_update(self, replace(batch, loss_mask=torch.ones_like(batch.loss_mask)))

    return mock.patch.object(Actor, "update", update)


def _head_with(loss: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    """loss(exact loss, loss without KL penalty, what a mean over the micro-batch multiplies a sum's part by)."""

    def policy_loss_head_(batch: TrainBatch, objective: Objective) -> Any:
        exact = policy_loss_head(batch, objective)
        plain = policy_loss_head(batch, replace(objective, spec=replace(objective.spec, kl_coeff=0.0)))

        def head(micro_batch: Any, given: Any) -> Any:
            output, without = exact(micro_batch, given), plain(micro_batch, given)
            to_mean = batch.num_loss_tokens / max(1, len(micro_batch.tokens)) / MICRO_BATCHES
            return replace(output, loss=loss(output.loss, without.loss, to_mean))

        return head

    return mock.patch.object(actor_module, "policy_loss_head", policy_loss_head_)


def mean_of_micro_batches() -> AbstractContextManager[Any]:
    return _head_with(lambda exact, plain, to_mean: exact * to_mean)


def kl_mean_of_micro_batches() -> AbstractContextManager[Any]:
    return _head_with(lambda exact, plain, to_mean: plain + (exact - plain) * to_mean)


def balance_loss_of_one_rank() -> AbstractContextManager[Any]:
    """As Megatron's own under sequence parallelism on two ranks: each rank's tokens count for half."""

    def total(self: Weights, aux: Tensor, z: Tensor) -> Tensor:
        return exact_total(self, aux, z) / 2

    return mock.patch.object(Weights, "total", total)


def tower_summed_over_tensor_ranks() -> AbstractContextManager[Any]:
    """Marked as Megatron's own norms are, which see a part of the tokens each."""

    def build_tower_(*args: Any) -> Any:
        tower = build_tower(*args)
        for parameter in tower.parameters():
            vars(parameter).update(average_gradients_across_tp_domain=False, sequence_parallel=True)
        return tower

    return mock.patch.object(vision_model, "build_tower", build_tower_)


def split_images_without_their_sum() -> AbstractContextManager[Any]:
    """The gradient that a rank has of its own images, as if its loss were the only one that sees them."""
    return mock.patch.object(_SumOverRanks, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


WRONG: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "mask dropped": mask_dropped,
    "mean of micro-batch means": mean_of_micro_batches,
    "KL averaged over micro-batches": kl_mean_of_micro_batches,
    "balance loss unscaled under sequence parallelism": balance_loss_of_one_rank,
    "tower summed over tensor ranks": tower_summed_over_tensor_ranks,
    "split images without their sum": split_images_without_their_sum,
}


def measure_wrong(cases: dict[str, list[Case]], folder: Path) -> dict[tuple[str, str], Measured]:
    """(name in WRONG, case) -> what the certificate says of it."""
    measured = {}
    for name, selected in cases.items():
        for case in selected:
            with laid_out(case.layout.megatron), WRONG[name]():
                measured[name, str(case)] = measure(case, folder)
    return measured
