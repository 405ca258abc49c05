"""The colocated engine over two processes answers as one process does, whatever the layout, and fails as one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.rollout.colocated import ColocatedEngine
from dapo_mcore.rollout.engine import Request, Sampling, generate
from dapo_mcore.types import Response
from tests.distributed.rollout_ranks import one_replica_over_all, replicas_and_failures
from tests.e2e.tiny_policies import (
    LENGTHS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    Letters,
    logprob_error,
    model_config,
    prompts,
    requests,
    rollout_config,
    save_policy,
    weights_in,
)
from tools.certificate.spawn import spawn

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
WANTED = requests(5, 3)  # 15: not the same number for two replicas
NATS = 1e-5


class Policies:
    """Two versions of a policy, and what a single process samples from them."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / "first", folder / "second"]
        self.models = [save_policy(path, "qwen3_moe", seed) for seed, path in enumerate(self.folders)]
        engine = ColocatedEngine(model_config(self.folders[0]), rollout_config(), Letters(), **LENGTHS)
        self.responses = [generate(engine, WANTED, SAMPLING)]
        engine.load(weights_in(self.folders[1]), 1)
        self.responses.append(generate(engine, WANTED, SAMPLING))
        engine.follow()
        engine.release()
        engine.close()


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"))


def assert_same(responses: list[Response], expected: list[Response]) -> None:
    assert [response.token_ids for response in responses] == [response.token_ids for response in expected]
    for ours, theirs in zip(responses, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=NATS, rtol=0)
        assert replace(ours, logprobs=()) == replace(theirs, logprobs=(), version=ours.version)


def test_two_replicas_answer_like_one_and_fail_together(policies: Policies) -> None:
    too_long = Request(prompts(8, PROMPT_LENGTH + 1)[7], 0, 1)
    ranks = spawn(replicas_and_failures, 2, *policies.folders, WANTED, too_long, SAMPLING)
    for answers in ranks:
        assert_same(answers["fresh"], policies.responses[0])
        assert_same(answers["updated"], policies.responses[1])
        assert_same(answers["few"], policies.responses[1][:1])
        assert_same(answers["after failure"], policies.responses[1])
        assert {response.version for response in answers["updated"]} == {1}
        assert answers["sum over ranks"] == 3.0
        assert answers["sampling failed"].startswith("rank 1: ValueError: prompt 7 (row 7) has 151 tokens")
        assert answers["update failed"].startswith("rank 1: ValueError:")
        assert "model.norm.weight" in answers["update failed"]


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["tensor parallel", "expert parallel"])
def test_a_replica_over_two_ranks_answers_like_one_process(policies: Policies, options: dict[str, Any]) -> None:
    ranks = spawn(one_replica_over_all, 2, *policies.folders, WANTED, SAMPLING, options)
    for answers in ranks:
        assert_same(answers["fresh"], policies.responses[0])
        for version, policy in ((1, 1), (2, 0), (3, 1)):
            responses = answers[f"update {version}"]
            assert_same(responses, policies.responses[policy])
            assert {response.version for response in responses} == {version}
            assert logprob_error(policies.models[policy], WANTED, responses) <= 2e-5
        assert answers["sum over ranks"] == 3.0
    (name,) = {answers["shared memory"] for answers in ranks}
    assert re.match("[0-9a-f]{32}-[^/]*$", name), "vLLM's own name is the same for every job on a host"


def test_a_replica_that_does_not_divide_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.tensor_model_parallel_size=2: does not divide the 1 ranks"):
        ColocatedEngine(model_config(tmp_path), rollout_config(tensor_model_parallel_size=2), Letters(), **LENGTHS)
