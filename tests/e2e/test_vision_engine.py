"""The declared weights of vision-language models against those that vLLM has, and pushed into a live engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dapo_mcore.rollout.engine import Request, Sampling
from dapo_mcore.weights.conversion import read_config
from dapo_mcore.weights.itinerary import mismatches, targets
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tests.e2e.tiny_vl_policies import (
    RESPONSE_LENGTH,
    chosen_experts,
    gap,
    image_tokens,
    requests_of,
    save_vl_policy,
    some_prompts,
    vl_policy,
)
from tests.e2e.vision_engine import parameters_of, pushed_and_loaded
from tests.tiny_vl import EXPERTS, KINDS, save_published, tiny_vl
from tools.certificate.spawn import spawn

(DENSE,) = EXPERTS["mlp_only_layers"]


def test_the_plan_fills_exactly_the_parameters_of_vllm_tower_included_and_published_files_fill_them_too(tmp_path):
    folders = {name: save_published(tiny_vl(name), tmp_path / name) for name in reversed(KINDS)}
    (found,) = spawn(parameters_of, 1, folders)
    for model_type, (shapes, left_out) in found.items():
        hf_config = read_config(folders[model_type])
        declared, rollout = list(parameters(hf_config)), RolloutLayout(ranks=1)
        plan = reshard_plan(hf_config, TrainLayout(ranks=1), rollout)
        assert mismatches(targets(declared, rollout, 0, shapes), plan.transfers, 0, shapes) == []
        assert any(name.startswith("visual.deepstack_merger_list.1.") for name in shapes)
        assert left_out == set()


@dataclass(frozen=True)
class Pushed:
    policy: Any
    requests: list[Request]
    answers: dict[str, Any]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    policy, folder = vl_policy(tower=1, decoder=2), tmp_path_factory.mktemp("pushed")
    first, second = save_vl_policy(vl_policy(), folder / "first"), save_vl_policy(policy, folder / "second")
    wanted = requests_of(some_prompts(image_tokens(first)), 3)
    sampling = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH, routes=True)
    answers = spawn(pushed_and_loaded, 2, first, second, wanted, sampling)[0]
    return Pushed(policy, wanted, answers)


def test_a_push_into_the_live_parameters_of_decoder_and_tower_equals_a_load_bit_for_bit(pushed: Pushed):
    assert pushed.answers["obstacle"] == ""
    assert pushed.answers["pushed"] == pushed.answers["loaded"]
    assert gap(pushed.policy, pushed.requests, pushed.answers["pushed"]) <= 2e-5
    assert gap(pushed.policy, pushed.requests, pushed.answers["before"]) > 0.05, "the policies differ too little"


def test_routes_are_of_the_tokens_of_pictures_too(pushed: Pushed):
    for request, response in zip(pushed.requests, pushed.answers["pushed"], strict=True):
        routes = torch.from_numpy(response.routes).long().sort(-1).values
        assert len(routes) == len(request.prompt.expanded_ids) + len(response.token_ids) - 1
        for layer, chosen in chosen_experts(pushed.policy, request.prompt, response).items():
            assert torch.equal(routes[:, layer], chosen)
        assert not routes[:, DENSE].any()
