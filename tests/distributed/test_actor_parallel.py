"""Two ranks compute what one process computes: loss, every gradient, every log-probability."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dapo_mcore.config import Dtype, Recompute
from tests.distributed.actor_cases import Case, Errors, Truth, compare_all
from tools.certificate import reference as hf_reference
from tools.certificate.spawn import spawn

BATCHES = {
    # ranks need 2 and 3 micro-batches; the longest response is above the budget of one
    "mixed": hf_reference.random_batch(0, [(5, 70), (3, 20), (9, 13), (2, 30), (7, 7)], old_logprobs=True),
    # the second data-parallel rank has nothing but empty micro-batches
    "single": hf_reference.random_batch(1, [(4, 21)], old_logprobs=False),
}
CASES = {
    "data parallel 2, dense": Case("qwen3"),
    "data parallel 2, one rank without work, dense": Case("llama", batch="single"),
    "data parallel 2, mixture of experts": Case("qwen3_moe_mixed"),
    "tensor parallel 2, untied": Case("llama", {"tp": 2}),
    "tensor parallel 2, tied, llama3 rope": Case("llama_tied_scaled_rope", {"tp": 2}),
    "tensor parallel 2, biases": Case("qwen2", {"tp": 2}),
    "tensor parallel 2, fewer KV groups than ranks": Case("llama_one_kv_group", {"tp": 2}),
    "sequence parallel 2, query and key norms": Case("qwen3_tied", {"tp": 2, "sp": True}),
    "sequence parallel 2, biases, tied": Case("qwen2_tied", {"tp": 2, "sp": True}),
    "sequence parallel 2, one response": Case("llama", {"tp": 2, "sp": True}, batch="single"),
    "expert parallel 2": Case("qwen3_moe", {"ep": 2}),
    "expert parallel 2, unnormalised router, tied": Case("qwen3_moe_unnormed", {"ep": 2}),
    "expert parallel 2, one rank without work": Case("qwen3_moe", {"ep": 2}, batch="single"),
    "expert tensor parallel 2": Case("qwen3_moe", {"tp": 2, "sp": True, "etp": 2}),
    "tensor parallel 2, whole experts on both ranks": Case("qwen3_moe", {"tp": 2, "sp": True}),
    "tensor parallel 2 with expert parallel 2": Case("qwen3_moe_mixed", {"tp": 2, "sp": True, "ep": 2}),
    "recompute full, expert parallel 2": Case("qwen3_moe", {"ep": 2, "recompute": Recompute.full}),
    "recompute selective, tensor parallel 2": Case("qwen3", {"tp": 2, "recompute": Recompute.selective}),
}
BF16_CASES = {
    "bf16, data parallel 2": Case("qwen3", dtype=Dtype.bf16),
    "bf16, expert parallel 2": Case("qwen3_moe", {"ep": 2}, dtype=Dtype.bf16),
}


def write_truth(folder: Path, family: str, batch_name: str) -> None:
    model, batch = hf_reference.tiny_model(family), BATCHES[batch_name]
    model.save_pretrained(folder / family)
    exact = hf_reference.in_float64(model)
    loss, gradients = hf_reference.loss_and_gradients(model, batch)
    with torch.no_grad():
        truth = Truth(hf_reference.response_logprobs(exact, batch), loss, gradients)
    torch.save((batch, truth), folder / f"{family}.{batch_name}.pt")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    folder = tmp_path_factory.mktemp("models")
    cases = CASES | BF16_CASES
    for family, batch in {(case.family, case.batch) for case in cases.values()}:
        write_truth(folder, family, batch)
    first, second = spawn(compare_all, 2, cases, folder)
    assert {name: e.metrics for name, e in first.items()} == {name: e.metrics for name, e in second.items()}
    return first


@pytest.mark.parametrize("case", CASES)
def test_logprobs_on_two_ranks_equal_hugging_face(case: str, errors: dict[str, Errors]) -> None:
    assert errors[case].logprobs <= 5e-6


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_on_two_ranks_equal_one_float64_process(case: str, errors: dict[str, Errors]) -> None:
    found = errors[case]
    assert found.loss <= 2e-6
    assert found.grad_norm <= 2e-6
    assert {name: error for name, error in found.gradients.items() if not error <= 2e-6} == {}


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_stays_within_its_rounding_of_float64(case: str, errors: dict[str, Errors]) -> None:
    found = errors[case]
    assert found.logprobs <= 0.1
    assert found.loss <= 0.02
    assert found.grad_norm <= 0.05
