"""Hugging Face == Megatron == vLLM: after load and after each of three training steps with a push, on two processes."""

import pytest

from dapo_mcore.config import MegatronConfig
from tests.distributed.sameness_ranks import STEPS, Case, run_cases
from tests.e2e.tiny_policies import FAMILIES, save_policy
from tests.e2e.tiny_vl_policies import save_vl_policy, vl_policy
from tools.certificate.spawn import spawn

DATA_PARALLEL = MegatronConfig()
TENSOR_PARALLEL = MegatronConfig(tensor_model_parallel_size=2, sequence_parallel=True)
EXPERT_PARALLEL = MegatronConfig(expert_model_parallel_size=2)
PIPELINE = MegatronConfig(pipeline_model_parallel_size=2)
CONTEXT_PARALLEL = MegatronConfig(context_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True)

DENSE = [name for name in FAMILIES if "moe" not in name]
MOE = [name for name in FAMILIES if "moe" in name]
CASES = [
    *(Case(name, TENSOR_PARALLEL, 1) for name in FAMILIES),
    *(Case(name, EXPERT_PARALLEL, 1) for name in MOE),
    *(Case(name, DATA_PARALLEL, 1) for name in ("llama", "qwen3_moe")),
    Case("qwen2 tied", PIPELINE, 1),
    Case("qwen3_moe", CONTEXT_PARALLEL, 1),
    Case("qwen3_vl_moe", EXPERT_PARALLEL, 1),  # text, one image, two images; the tower is trained
]
ONE_ENGINE = [Case(name, TENSOR_PARALLEL, 2) for name in ("llama", "qwen2 tied", "qwen3")]
ONE_ENGINE += [Case(name, EXPERT_PARALLEL, 2) for name in MOE]

NAMES = [str(case) for case in CASES + ONE_ENGINE]

MEGATRON_NATS, VLLM_NATS = 5e-6, 2e-5


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for seed, family in enumerate(FAMILIES):
        save_policy(folder / family, family, seed)
    save_vl_policy(vl_policy(), folder / "qwen3_vl_moe")
    # vLLM lays its groups out once per process: each rollout layout, dense or MoE, has processes of its own.
    said: list[dict] = [{}, {}]
    for cases in (CASES, ONE_ENGINE):
        for families in (DENSE, [*MOE, "qwen3_vl_moe"]):
            ranks = spawn(run_cases, 2, [c for c in cases if c.family in families], str(folder), limit_s=1200.0)
            said = [known | new for known, new in zip(said, ranks, strict=True)]
    return said


@pytest.mark.parametrize("case", NAMES)
def test_all_three_say_the_same_after_load_and_after_every_push(said, case):
    for rank in said:
        versions = rank[case]
        assert len(versions) == STEPS + 1
        for version in versions:
            assert (version.megatron - version.hugging_face).abs().max() <= MEGATRON_NATS
            assert (version.vllm - version.hugging_face).abs().max() <= VLLM_NATS


@pytest.mark.parametrize("case", NAMES)
def test_training_moved_the_policy_by_far_more_than_the_tolerance(said, case):
    assert said[0][case][0].moved <= VLLM_NATS
    assert all(version.moved > 1000 * VLLM_NATS for version in said[0][case][1:])
