"""The declared weights of vision-language models against those that vLLM has."""

from __future__ import annotations

from dapo_mcore.weights.conversion import read_config
from dapo_mcore.weights.itinerary import mismatches, targets
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tests.e2e.vision_engine import parameters_of
from tests.tiny_vl import KINDS, save_published, tiny_vl
from tools.certificate.spawn import spawn


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
