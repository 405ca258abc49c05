"""The order of vllm-ascend around vLLM's real CPU engine: what is sampled then is the policy's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dapo_mcore.platform import ascend_engines, platform
from dapo_mcore.rollout import vllm_engine, vllm_env, vllm_runtime, vllm_start
from dapo_mcore.rollout.engine import Sampling, generate
from tests.e2e.tiny_policies import RESPONSE_LENGTH, logprob_error, requests, save_policy, started, weights_in
from tests.npu.fakes.ascend_engine import Release
from tests.npu.fakes.ascend_model import Violation
from tests.npu.fakes.ascend_on_cpu import install

SAMPLING = Sampling(temperature=1.0, max_tokens=RESPONSE_LENGTH)
TOLERANCE = 2e-5  # nats, float32


@pytest.mark.parametrize("release", list(Release))
def test_logprobs_are_the_policys_after_each_of_two_turns(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascend = replace(platform(), name="ascend", engines=ascend_engines.traits())
    for module in (vllm_engine, vllm_env, vllm_runtime, vllm_start):
        monkeypatch.setattr(module, "platform", lambda: ascend)
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    install(release, monkeypatch.setattr)
    models = [save_policy(tmp_path / str(seed), "qwen3_moe", seed) for seed in range(3)]
    wanted = requests(2, 2)
    with started(tmp_path / "0") as engine:
        assert engine.examine(lambda runtime: runtime.obstacle) == ascend.engines.private_layout
        for version in (1, 2):
            engine.sleep()
            engine.load(weights_in(tmp_path / str(version)), version)
            engine.wake()
            responses = generate(engine, wanted, SAMPLING)
            assert logprob_error(models[version], wanted, responses) <= TOLERANCE
        engine.sleep()
        engine._llm.wake_up(["weights"])
        engine.wake()
        if release is Release.v0_23:
            with pytest.raises(Violation, match="experts not in their layout"):
                generate(engine, wanted, SAMPLING)
