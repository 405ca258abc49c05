"""A push by a plan into live engines of several ranks: what they sample with afterwards, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.rollout.engine import Sampling
from tests.distributed.push_ranks import Case, faults_and_leaks, one_after_another, stale_expert_map
from tests.e2e.tiny_policies import requests, save_policy
from tools.certificate.spawn import spawn

SAMPLING = Sampling(temperature=1.0, max_tokens=8)
WANTED = requests(3, 2)
ODD = "qwen3_moe tied, odd width"
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
# A process keeps the engine layout of its first engine: one launch for each.
ONE_ENGINE = {
    "tensor parallel to the same": Case(ODD, {"tp": 2, "sp": True, "etp": 2}, TP2),
    "data parallel with overlap to tensor parallel": Case(ODD, OVERLAP, TP2),
}
TWO_ENGINES = {
    "tensor parallel to replicas": Case(ODD, {"tp": 2, "sp": True, "etp": 1}),
    "stages to replicas": Case(ODD, {"pp": 2}),
    "interleaved chunks of stages to replicas": Case("qwen3", {"pp": 2, "vpp": 2}, sizes={"num_hidden_layers": 4}),
}
EXPERTS = Case("qwen3_moe", {"ep": 2}, {**TP2, "enable_expert_parallel": True})
FOUR_RANKS = {"stages of tensor parallel ranks to two engines": Case("qwen2 tied", {"tp": 2, "pp": 2}, TP2)}


def saved(folder: Path, cases: dict[str, Case]) -> Path:
    for name, case in cases.items():
        save_policy(folder / name, case.family, 0, **case.sizes)
    return folder


def assert_like_fresh(answers: dict[str, Any]) -> None:
    before, pushed, fresh = ([r.logprobs for r in answers[key]] for key in ("before", "pushed", "fresh"))
    assert pushed == fresh
    assert [r.token_ids for r in answers["pushed"]] == [r.token_ids for r in answers["fresh"]]
    assert {r.version for r in answers["pushed"]} == {3}
    assert before != pushed, "training has changed nothing, so a push that did nothing would pass"


@pytest.mark.parametrize(
    ("cases", "ranks"), [(ONE_ENGINE, 2), (TWO_ENGINES, 2), (FOUR_RANKS, 4)], ids=["one engine", "two", "four ranks"]
)
def test_after_three_steps_and_pushes_an_engine_is_bit_for_bit_a_fresh_one(
    cases: dict[str, Case], ranks: int, tmp_path: Path
) -> None:
    for answers in spawn(one_after_another, ranks, cases, saved(tmp_path, cases), WANTED, SAMPLING):
        for name in cases:
            assert_like_fresh(answers[name])


def test_whole_experts_stay_where_they_are_and_a_stale_expert_map_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"model": EXPERTS}) / "model"
    for answers in spawn(stale_expert_map, 2, EXPERTS, folder, WANTED, SAMPLING):
        assert_like_fresh(answers)
        assert answers["messages"] == 0
        assert (
            "layers.1.mlp.experts.routed_experts.w2_weight, expert 4: of 4096 elements from rank 1" in answers["stale"]
        )
        assert "layers.0." not in answers["stale"]
        assert answers["mended"] == ""


def assert_ways_are_refused_and_chosen(answers: dict[str, Any], leads: bool) -> None:
    assert "above weights.max_probe_gap=1e-12" in answers["unlike"]
    reason = "model.layers.1.self_attn.o_proj holds its weights packed for linear, a layout that is not known"
    assert "weights.push=direct" in answers["direct"]
    assert reason in answers["direct"]
    assert "set weights.push=auto or reload" in answers["direct"]
    assert answers["auto"] == (f"weights are pushed through the engine's loader: {reason}\n" if leads else "")
    version, gap = answers["reloaded"]
    assert version == 0
    assert gap < 1e-4
    assert answers["packed anew"] == "", "the loader has packed the layer in the known way again"


def test_what_goes_wrong_on_the_way_is_named_and_twenty_pushes_leave_nothing_behind(tmp_path: Path) -> None:
    case = TWO_ENGINES["stages to replicas"]
    folder = saved(tmp_path, {"model": case}) / "model"
    for rank, answers in enumerate(spawn(faults_and_leaks, 2, case, folder)):
        assert "embed_tokens.weight: of 7680 elements from rank 0" in answers["byte"]
        assert "rank 1 has 7680" in answers["byte"]
        assert "layers.0.input_layernorm.weight: of 64 elements from rank 0" in answers["tensor"]
        assert "rank 0 has 0" in answers["tensor"]
        assert answers["version"] == -1, "weights that did not arrive have no version"
        assert answers["exchanged"] == "", "checksums on both sides of a wrong map agree"
        assert answers["gap exchanged"] > 0.05
        assert answers["whole"] == ""
        assert answers["gap"] < 1e-4
        assert_ways_are_refused_and_chosen(answers, leads=rank == 0)
        resident = answers["resident"]
        assert resident[-1] - resident[3] < 2 << 20
