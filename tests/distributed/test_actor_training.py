"""Several updates on two ranks: optimizer, clipping, learning rate, and continuing from a saved state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dapo_mcore.config import Dtype, MegatronConfig
from tests.distributed.actor_cases import TRAINING, Resume, run_training
from tools.certificate import reference as hf_reference
from tools.certificate.layouts import OVERLAP
from tools.certificate.layouts import megatron_config as layout
from tools.certificate.spawn import spawn

OFFLOAD = {"param_offload": True, "grad_offload": True, "optimizer_offload": True}
BATCHES = [
    hf_reference.random_batch(seed, [(5, 30), (3, 20), (9, 13), (2, 17)], old_logprobs=seed > 0) for seed in range(3)
]
OF_THE_LAYOUT = {"actor/imbalance"}
DISTRIBUTED = {"use_distributed_optimizer": True}
TRAININGS: dict[str, tuple[str, MegatronConfig]] = {
    "dense, optimizer on every rank": ("qwen3_tied", layout()),
    "dense, distributed optimizer": ("qwen3_tied", layout(**DISTRIBUTED)),
    "dense, tensor parallel": ("qwen3_tied", layout(tp=2, sp=True, **DISTRIBUTED)),
    "experts, data parallel": ("qwen3_moe", layout()),
    "experts, expert parallel": ("qwen3_moe", layout(ep=2, **DISTRIBUTED)),
    "dense, overlap": ("qwen3_tied", layout(**OVERLAP)),
    "dense, pipeline, overlap": ("qwen3_tied", layout(pp=2, **OVERLAP)),
    "untied head, overlap": ("qwen3", layout(**OVERLAP)),
    "untied head, pipeline, overlap": ("qwen3", layout(pp=2, **OVERLAP)),
    "experts, context and expert parallel, overlap": ("qwen3_moe", layout(cp=2, ep=2, **OVERLAP)),
    "experts, tensor and expert parallel": ("qwen3_moe", layout(tp=2, sp=True, ep=2, **DISTRIBUTED)),
}
RESUMES = {
    "expert parallel": Resume("qwen3_moe", layout(ep=2, **DISTRIBUTED), layout(ep=2, **DISTRIBUTED)),
    "expert parallel to tensor parallel": Resume(
        "qwen3_moe", layout(ep=2, **DISTRIBUTED), layout(tp=2, sp=True, etp=2, **DISTRIBUTED)
    ),
    "expert parallel to data parallel": Resume("qwen3_moe", layout(ep=2, **DISTRIBUTED), layout(**DISTRIBUTED)),
    "expert parallel, overlap": Resume("qwen3_moe", layout(ep=2, **OVERLAP), layout(ep=2, **OVERLAP)),
    "expert parallel, overlap, to one that is offloaded": Resume(
        "qwen3_moe", layout(ep=2, **OVERLAP), layout(ep=2, **OVERLAP, **OFFLOAD)
    ),
    "pipeline to context parallel": Resume("qwen3_tied", layout(pp=2, **OVERLAP), layout(cp=2, **DISTRIBUTED)),
    "context and expert parallel to pipeline": Resume(
        "qwen3_moe", layout(cp=2, ep=2, **DISTRIBUTED), layout(pp=2, **DISTRIBUTED)
    ),
    "a policy that sees, expert parallel, overlap, to tensor parallel": Resume(
        "qwen3_vl_moe", layout(ep=2, **OVERLAP), layout(tp=2, sp=True, **DISTRIBUTED)
    ),
    "data parallel to expert parallel": Resume("qwen3_moe", layout(**DISTRIBUTED), layout(ep=2, **DISTRIBUTED)),
    "tensor parallel to data parallel": Resume("qwen3_tied", layout(tp=2, **DISTRIBUTED), layout(**DISTRIBUTED)),
    "data parallel, bf16": Resume("qwen3_tied", layout(**DISTRIBUTED), layout(**DISTRIBUTED), Dtype.bf16),
    "data parallel, optimizer on every rank": Resume("qwen3_tied", layout(), layout()),
    "data parallel, bf16, offloaded": Resume(
        "qwen3_tied", layout(**DISTRIBUTED, **OFFLOAD), layout(**DISTRIBUTED, **OFFLOAD), Dtype.bf16
    ),
}
TURNS = (
    "dense, optimizer on every rank",
    "dense, distributed optimizer",
    "dense, overlap",
    "untied head, pipeline, overlap",
    "experts, data parallel",
    "experts, expert parallel",
    "experts, context and expert parallel, overlap",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "qwen3_tied", "qwen3_moe", "qwen3_vl_moe"):
        hf_reference.save_model(hf_reference.tiny_model(family), folder / family)
    turns = {name: (TRAININGS[name][0], replace(TRAININGS[name][1], **OFFLOAD)) for name in TURNS}
    return spawn(run_training, 2, TRAININGS, RESUMES, turns, folder, BATCHES)[0]


def hf_training(family: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and final weights of torch's own AdamW on the float64 reference."""
    model = hf_reference.in_float64(hf_reference.tiny_model(family))
    optim = TRAINING["optim"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    norms = []
    for step, batch in enumerate(BATCHES):
        for group in adam.param_groups:
            group["lr"] = optim.lr * min(1.0, (step + 1) / optim.lr_warmup_steps)
        adam.zero_grad()
        hf_reference.dapo_loss(hf_reference.response_logprobs(model, batch), batch).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad).item())
        adam.step()
    return norms, hf_reference.split_experts({name: p.detach() for name, p in model.named_parameters()})


@pytest.fixture(scope="module")
def truth() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {family: hf_training(family) for family in ("qwen3", "qwen3_tied", "qwen3_moe")}


@pytest.mark.parametrize("case", TRAININGS)
def test_three_updates_equal_adamw_on_hugging_face(case: str, results: Any, truth: Any) -> None:
    metrics, weights = results[0][case]
    norms, expected = truth[TRAININGS[case][0]]
    assert [m["actor/grad_norm"].value for m in metrics] == pytest.approx(norms, rel=1e-4)
    # Adam divides by the gradient's own size: where that is rounding noise, a step differs by up to its whole length.
    moved = 2.5 * TRAINING["optim"].lr
    for name, weight in expected.items():
        difference = (weights[name].double() - weight).abs()
        assert difference.mean() <= 1e-3 * moved, name
        assert difference.max() <= 2 * moved, name


@pytest.mark.parametrize("case", TRAININGS)
def test_the_first_step_of_a_warm_up_already_learns(case: str, results: Any) -> None:
    rates = [m["actor/lr"].value for m in results[0][case][0]]
    assert rates == pytest.approx([0.005, 0.01, 0.01])


@pytest.mark.parametrize("case", RESUMES)
def test_a_loaded_state_continues_as_if_uninterrupted(case: str, results: Any) -> None:
    uninterrupted, resumed = results[1][case]
    same_layout = replace(RESUMES[case].saver, **OFFLOAD) == replace(RESUMES[case].loader, **OFFLOAD)
    for expected, found in zip(uninterrupted, resumed, strict=True):
        values = {name: ratio.value for name, ratio in expected.items() if name not in OF_THE_LAYOUT}
        tolerance = {"rel": 0, "abs": 0} if same_layout else {"rel": 1e-3}
        assert {name: found[name].value for name in values} == pytest.approx(values, **tolerance)


@pytest.mark.parametrize("case", TURNS)
def test_an_offloaded_policy_has_no_memory_on_the_device(case: str, results: Any) -> None:
    assert results[2][case][2] == [0] * (len(BATCHES) + 1)


@pytest.mark.parametrize("case", TURNS)
def test_offloading_between_updates_changes_no_bit(case: str, results: Any) -> None:
    metrics, weights, _ = results[2][case]
    expected_metrics, expected_weights = results[0][case]
    assert metrics == expected_metrics
    assert weights.keys() == expected_weights.keys()
    assert [name for name, weight in expected_weights.items() if not torch.equal(weights[name], weight)] == []
