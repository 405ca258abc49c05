"""New weights for an engine of vllm-ascend: our order keeps its contract, every other one that is known is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from dapo_mcore.config import ModelConfig, RolloutConfig
from dapo_mcore.platform import ascend_engines, platform
from dapo_mcore.rollout import vllm_ascend, vllm_engine, vllm_env, vllm_runtime, vllm_start
from dapo_mcore.rollout.vllm_engine import VllmEngine
from tests.npu.fakes.ascend_engine import CPU, AscendEngine, Release, Weights
from tests.npu.fakes.ascend_model import Violation, expected_logprobs, random_weights

OBLONG, SQUARE = (8, 6), (8, 4)  # hidden size and expert width; a square w13 keeps its shape when it is transposed
PROMPT, PICTURE = (3, 1, 4), 5
BOTH = list(Release)


class Silent:
    eos_token_id: int | None = 0

    def decode(self, token_ids: object, *, skip_special_tokens: bool) -> str:
        return ""


@pytest.fixture(autouse=True)
def on_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is an Ascend rank as far as rollout can tell, with an environment of its own."""
    ascend = replace(platform(), name="ascend", engines=ascend_engines.traits())
    for module in (vllm_engine, vllm_env, vllm_runtime, vllm_start):
        monkeypatch.setattr(module, "platform", lambda: ascend)
    for name in ("VLLM_ASCEND_ENABLE_NZ", *ascend_engines.ALLOCATOR_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def started(
    release: Release, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int] = OBLONG
) -> VllmEngine:
    """Our engine around the one of vllm-ascend, which reads the arguments that we give it."""
    monkeypatch.setattr("vllm.LLMEngine.from_engine_args", lambda args: AscendEngine(release, args, weights, sizes))
    options = RolloutConfig(kv_cache_mb=1, enable_expert_parallel=True)
    lengths = {"max_prompt_length": 8, "max_response_length": 8}
    return VllmEngine(ModelConfig(path=str(Path(__file__).parent)), options, Silent(), **lengths)


def sampled(engine: Any) -> Tensor:
    return getattr(engine, "_llm", engine).sample(PROMPT, PICTURE)


def assert_policy(engine: Any, weights: dict[str, Tensor]) -> None:
    torch.testing.assert_close(sampled(engine).double(), expected_logprobs(weights, PROMPT, PICTURE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [OBLONG, SQUARE])
@pytest.mark.parametrize("release", BOTH)
def test_after_every_turn_the_engine_samples_like_one_freshly_loaded(
    release: Release, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [random_weights(seed, *sizes) for seed in range(4)]
    engine = started(release, policies[0], monkeypatch, sizes)
    for version, policy in enumerate(policies[1:], 1):
        engine.sleep()
        assert engine.version == -1
        engine.load(policy.items(), version)
        engine.wake()
        assert engine.version == version
        assert_policy(engine, policy)
    fresh = started(release, policies[3], monkeypatch, sizes)
    assert torch.equal(sampled(engine), sampled(fresh))


@pytest.mark.parametrize("release", BOTH)
def test_an_engine_that_never_slept_and_one_that_is_loaded_twice_awake_take_new_weights(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, newest = (random_weights(seed, *OBLONG) for seed in range(3))
    engine = started(release, old, monkeypatch)
    assert_policy(engine, old)
    engine.load(new.items(), 1)
    assert_policy(engine, new)
    engine.sleep()
    for version, policy in ((2, old), (3, newest)):
        engine.load(policy.items(), version)
    engine.wake()
    assert_policy(engine, newest)


@pytest.mark.parametrize("release", BOTH)
def test_a_push_that_broke_off_can_be_repeated(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_weights(0, *OBLONG), random_weights(1, *OBLONG)
    engine = started(release, old, monkeypatch)
    engine.sleep()
    with pytest.raises(ValueError, match=r"did not come: head\.weight"):
        engine.load([(name, tensor) for name, tensor in new.items() if name != "head.weight"], 1)
    assert engine.version == -1
    engine.sleep()  # as the turn ends, however it ends
    engine.load(new.items(), 1)
    engine.wake()
    assert_policy(engine, new)


def test_experts_that_moved_while_they_were_loaded_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(Release.v0_23, random_weights(0, *OBLONG), monkeypatch)

    def process_elsewhere(model: Any, *arguments: Any) -> None:
        process_weights_after_loading(model, *arguments)
        model.mlp.experts.w2_weight.data = model.mlp.experts.w2_weight.data.clone()

    monkeypatch.setattr(vllm_ascend, "process_weights_after_loading", process_elsewhere)
    engine.sleep()
    with pytest.raises(RuntimeError, match=r"did not bring mlp\.experts\.w2_weight back"):
        engine.load(random_weights(1, *OBLONG).items(), 1)


def test_the_update_calls_of_vllm_ascend_do_to_an_engine_that_never_slept_what_ours_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = random_weights(0, *OBLONG), random_weights(1, *OBLONG)
    ours, theirs = (started(Release.v0_23, old, monkeypatch) for _ in range(2))
    ours.load(new.items(), 1)
    update(theirs._llm, new)
    assert torch.equal(sampled(ours), sampled(theirs))


def test_weights_are_written_to_by_the_loader_of_vllm_alone() -> None:
    runtime = vllm_runtime.RuntimeWeights(nn.Linear(2, 2))
    assert runtime.obstacle == "vllm-ascend holds experts transposed, in a layout of its own"


@pytest.mark.parametrize("value", ["page_size:1g,expandable_segments:True", "expandable_segments: True"])
@pytest.mark.parametrize("name", ascend_engines.ALLOCATOR_VARIABLES)
def test_expandable_segments_are_refused_before_the_engine_starts(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name}={value}: .*; unset {name}$"):
        started(Release.v0_23, random_weights(0, *OBLONG), monkeypatch)


def test_nz_is_off_in_environment_and_options_whatever_was_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "2")
    worker = started(Release.v0_23, random_weights(0, *OBLONG), monkeypatch)._llm.worker  # type: ignore[attr-defined]
    worker.start_weight_update()
    assert worker.args.additional_config == {"weight_nz_mode": 0}


Model = Any  # of the fake
Caller = Callable[[AscendEngine, dict[str, Tensor]], None]


def attach(model: Model) -> None:
    for name in ("w13_weight", "w2_weight"):
        getattr(model.mlp.experts, name).weight_loader = model.mlp.experts.weight_loader


def process(llm: AscendEngine) -> None:
    process_weights_after_loading(llm.worker.model, llm.worker.vllm_config.model_config, CPU)


def update(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    llm.worker.start_weight_update()
    llm.worker.update_weights(new.items())
    llm.worker.finish_weight_update()
    llm.reset_prefix_cache()
    llm.reset_encoder_cache()


def woken(llm: AscendEngine) -> AscendEngine:
    llm.sleep(1)
    llm.wake_up(["weights"])
    return llm


def loaded(llm: AscendEngine, new: Weights) -> AscendEngine:
    attach(woken(llm).worker.model)
    llm.worker.load_weights(new)
    return llm


def wake_without_reload(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    woken(llm).wake_up(["kv_cache"])


def reload_without_wake(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    llm.sleep(1)
    attach(llm.worker.model)
    llm.worker.load_weights(new.items())


def raw_load_into_an_engine_that_never_slept(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    attach(llm.worker.model)
    llm.worker.load_weights(new.items())


def process_twice(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    process(loaded(llm, new.items()))
    process(llm)


def process_after_every_bucket(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    pairs = list(new.items())
    process(loaded(llm, pairs[:5]))
    llm.worker.load_weights(pairs[5:])


def process_never(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    loaded(llm, new.items()).wake_up(["kv_cache"])


def forget_the_loaders(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    woken(llm).worker.load_weights(new.items())


def drop_the_weights(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    llm.sleep(2)


def wake_the_kv_cache_never(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    process(loaded(llm, new.items()))


def reload_layer_by_layer_after_waking(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    update(woken(llm), new)
    llm.wake_up(["kv_cache"])


def move_the_weights(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    attach(woken(llm).worker.model)
    for name in ("w13_weight", "w2_weight"):
        parameter = getattr(llm.worker.model.mlp.experts, name)
        parameter.data = parameter.data.contiguous()
    llm.worker.load_weights(new.items())
    process(llm)
    llm.wake_up(["kv_cache"])


def take_the_order_of_0_23(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    process(loaded(llm, new.items()))
    llm.wake_up(["kv_cache"])


def process_what_was_not_loaded(llm: AscendEngine, new: dict[str, Tensor]) -> None:
    process(woken(llm))


V = Release.v0_23
WRONG: list[tuple[Caller, Release, str]] = [
    (wake_without_reload, V, "not in its runtime layout when the engine sampled"),
    (reload_without_wake, V, "loaded while the weights sleep"),
    (reload_without_wake, Release.newer, "loaded while the weights sleep"),
    (raw_load_into_an_engine_that_never_slept, V, "experts in their runtime layout"),
    (raw_load_into_an_engine_that_never_slept, Release.newer, "experts in their runtime layout"),
    (process_twice, V, "post-processed twice"),
    (process_after_every_bucket, V, "no weight_loader|runtime layout"),
    (process_never, V, "not in its runtime layout when the engine sampled"),
    (forget_the_loaders, V, "has no weight_loader"),
    (drop_the_weights, V, "drops expert_ids_per_ep_rank"),
    (wake_the_kv_cache_never, V, "sampled while kv_cache slept"),
    (reload_layer_by_layer_after_waking, V, "size|runtime layout"),
    (move_the_weights, V, "not where the captured graphs read them"),
    (take_the_order_of_0_23, Release.newer, "experts in their runtime layout"),
    (process_what_was_not_loaded, Release.newer, "without having been loaded"),
]


@pytest.mark.parametrize("sizes", [OBLONG, SQUARE], ids=["oblong", "square"])
@pytest.mark.parametrize(("caller", "release", "caught"), WRONG, ids=[f"{c.__name__}, {r.value}" for c, r, _ in WRONG])
def test_a_wrong_caller_is_caught(
    caller: Caller, release: Release, caught: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm: Any = started(release, random_weights(0, *sizes), monkeypatch, sizes)._llm
    sampled(llm)

    def call_and_sample() -> None:
        caller(llm, random_weights(1, *sizes))
        sampled(llm)

    with pytest.raises((Violation, RuntimeError), match=caught):
        call_and_sample()


@pytest.mark.parametrize("cache", ["reset_prefix_cache", "reset_encoder_cache"])
def test_a_cache_that_is_kept_answers_with_the_old_weights(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_weights(0, *OBLONG), random_weights(1, *OBLONG)
    engine = started(Release.v0_23, old, monkeypatch)
    sampled(engine)
    monkeypatch.setattr(engine._llm, cache, lambda: True)
    engine.load(new.items(), 1)
    with pytest.raises(AssertionError):
        assert_policy(engine, new)


@pytest.mark.parametrize(
    ("environment", "options", "caught"),
    [
        ({}, {}, "weight_nz_mode"),
        ({"VLLM_ASCEND_ENABLE_NZ": "1"}, {}, "weight_nz_mode"),
        ({"VLLM_ASCEND_ENABLE_NZ": "0"}, {"weight_nz_mode": 1}, "weight_nz_mode"),
        ({"VLLM_ASCEND_ENABLE_NZ": "1"}, {"weight_nz_mode": 0}, "VLLM_ASCEND_ENABLE_NZ"),
        ({"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}, {"weight_nz_mode": 0}, "expandable segments"),
    ],
)
def test_an_engine_that_was_started_wrongly_is_caught(
    environment: dict[str, str], options: dict[str, int], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(additional_config=options, enable_sleep_mode=True, enable_expert_parallel=True)
    weights = random_weights(0, *OBLONG)

    def start_and_update() -> None:
        llm = AscendEngine(Release.v0_23, args, weights, OBLONG)
        llm.worker.start_weight_update() if options.get("weight_nz_mode") == 0 else woken(llm)

    with pytest.raises((Violation, ValueError), match=caught):
        start_and_update()
