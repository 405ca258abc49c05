"""The reference model under the policy's layout scores what one process scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_mcore.actor import parallel
from dapo_mcore.actor.reference import build_reference
from dapo_mcore.config import ActorConfig, Dtype, ModelConfig, RefConfig
from dapo_mcore.types import TrainBatch
from tools.certificate.layouts import DENSE, MOE, TIED, megatron_config
from tools.certificate.reference import in_float64, random_batch, response_logprobs, tiny_model
from tools.certificate.spawn import spawn

BATCH = random_batch(0, [(5, 70), (3, 20), (9, 13), (2, 30), (7, 7)], old_logprobs=False)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "data parallel": (DENSE, {}),
    "sequence parallel": (MOE, {"tp": 2, "sp": True}),
    "pipeline parallel": (TIED, {"pp": 2}),
    "context parallel": (MOE, {"cp": 2}),
    "expert parallel": (MOE, {"ep": 2}),
}


def score_all(folder: Path, batch: TrainBatch) -> dict[str, Tensor]:
    """Runs on every rank."""
    scored = {}
    for name, (family, sizes) in CASES.items():
        options = ActorConfig(megatron=megatron_config(**sizes), ppo_max_token_len_per_gpu=40)
        parallel.init_model_parallel(options.megatron, seed=0)
        reference = build_reference(
            ModelConfig(path=str(folder / family), dtype=Dtype.fp32), options, RefConfig(param_offload=True)
        )
        scored[name] = reference.score(batch, responses_per_update=3).ref_logprobs
        parallel.destroy_model_parallel()
    return scored


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("models")
    for family in {family for family, _ in CASES.values()}:
        tiny_model(family).save_pretrained(folder / family)
    return spawn(score_all, 2, folder, BATCH)


@pytest.mark.parametrize("case", CASES)
def test_every_layout_of_the_reference_agrees_with_hugging_face(case: str, scores: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        exact = response_logprobs(in_float64(tiny_model(CASES[case][0])), BATCH)
    for rank in scores:
        assert (rank[case] - exact)[BATCH.loss_mask].abs().max() <= 5e-6
