"""Two ranks that see images compute what transformers does in one process: log-probabilities and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dapo_mcore.config import Recompute
from tests.distributed.actor_cases import Case, Errors, Truth, compare_all
from tests.tiny_vl import KINDS, save_published, tiny_vl
from tests.vision_packs import mixed_batch, reference_gradients
from tools.certificate.spawn import spawn

# Sequences with no, one and two images are in different micro-batches, and on different data-parallel ranks.
CASES = {
    "data parallel 2, dense": Case("qwen3_vl"),
    "tensor parallel 2, dense": Case("qwen3_vl", {"tp": 2}),
    "sequence parallel 2": Case("qwen3_vl_moe", {"tp": 2, "sp": True}),
    "expert parallel 2, recompute full": Case("qwen3_vl_moe", {"ep": 2, "recompute": Recompute.full}),
    "context parallel 2": Case("qwen3_vl_moe", {"cp": 2}),
    "pipeline parallel 2": Case("qwen3_vl_moe", {"pp": 2}),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    folder, batch = tmp_path_factory.mktemp("models"), mixed_batch()
    for model_type in KINDS:
        model = tiny_vl(model_type)
        save_published(model, folder / model_type)
        logprobs, gradients = reference_gradients(model, batch)
        # On-policy with advantages of 1 the loss is minus the mean ratio, whatever the policy.
        torch.save((batch, Truth(logprobs, -1.0, gradients)), folder / f"{model_type}.mixed.pt")
    first, second = spawn(compare_all, 2, CASES, Path(folder))
    assert {name: e.metrics for name, e in first.items()} == {name: e.metrics for name, e in second.items()}
    return first


@pytest.mark.parametrize("case", CASES)
def test_logprobs_and_gradients_on_two_ranks_equal_those_of_transformers(case: str, errors: dict[str, Errors]) -> None:
    found = errors[case]
    assert found.logprobs <= 5e-6
    assert found.loss <= 2e-6
    assert {name: error for name, error in found.gradients.items() if not error <= 3e-6} == {}
