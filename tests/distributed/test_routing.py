"""Routers on several ranks: recomputation finds its micro-batch, and what would be silently wrong shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor.routed_layer import RoutedLayer
from dapo_mcore.actor.router_losses import balance_terms
from tools.certificate.cases import Case, write_models, write_truths
from tools.certificate.layouts import LAYOUTS, MOE
from tools.certificate.measure import Measured, measure_all
from tools.certificate.options import OPTIONS
from tools.certificate.spawn import spawn

LAYOUT = {layout.name: layout for layout in LAYOUTS}
# Micro-batches of one size: a mix-up of them is no error of shapes.
OPTION = "routers, responses of one length"
OPTIONS_HERE = {OPTION: replace(OPTIONS["router replay and losses"], lengths=((5, 30),) * 4)}
RECOMPUTING = Case(LAYOUT["PP2xVPP2, recompute full"], MOE, OPTION)
SEQUENCE_PARALLEL = Case(LAYOUT["TP2+SP"], MOE, OPTION)
RIGHT = [RECOMPUTING, SEQUENCE_PARALLEL]


def latest_micro_batch(layer: RoutedLayer, router: Any, args: Any) -> None:
    """As if recomputation were of the micro-batch that went forward last."""
    layer._now = layer._latest


def balance_of_own_tokens(logits: Tensor, response: Tensor, lengths: Tensor, topk: int, group: Any) -> Any:
    """As if a rank's tokens were the whole response."""
    return balance_terms(logits, response, lengths, topk, dist.new_subgroups(1)[0])


# name -> case, and what is put in place of what
WRONG: dict[str, tuple[Case, str, Any]] = {
    "replay of the latest micro-batch": (
        RECOMPUTING, "dapo_mcore.actor.routed_layer.RoutedLayer._take", latest_micro_batch
    ),
    "balance over a rank's own tokens": (
        SEQUENCE_PARALLEL, "dapo_mcore.actor.routed_layer.balance_terms", balance_of_own_tokens
    ),
}  # fmt: skip


def measure_right_and_wrong(folder: Path) -> dict[str, Measured]:
    with mock.patch.dict(OPTIONS, OPTIONS_HERE):
        measured = {str(case): m for case, m in zip(RIGHT, measure_all(RIGHT, folder), strict=True)}
        for name, (case, place, replacement) in WRONG.items():
            with mock.patch(place, replacement):
                (measured[name],) = measure_all([case], folder)
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("models")
    with mock.patch.dict(OPTIONS, OPTIONS_HERE):
        write_models(RIGHT, folder)
        write_truths(RIGHT, folder)
    return spawn(measure_right_and_wrong, 2, folder)[0]


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_replay_and_losses_equal_one_float64_process(case: Case, measured: dict[str, Measured]) -> None:
    assert measured[str(case)].is_within, measured[str(case)]


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_silently_wrong_is_outside_the_bar(name: str, measured: dict[str, Measured]) -> None:
    assert not measured[name].is_within
    assert measured[name].gradient.error > 1e-3
