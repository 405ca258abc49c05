"""The actor on one rank against Hugging Face in float64, and what must fail when the loss is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_mcore.actor import actor as actor_module
from dapo_mcore.actor.actor import Actor, NonFiniteUpdateError
from dapo_mcore.actor.loss_head import policy_loss_head
from dapo_mcore.config import Dtype, OldLogprobs, OptimConfig, Recompute
from dapo_mcore.types import TrainBatch
from tools.certificate import reference as hf_reference
from tools.certificate.layouts import SEEING
from tools.certificate.measure import gradients, relative_error

MakeActor = Callable[..., Actor]
LENGTHS = [(5, 20), (9, 13), (30, 3), (2, 44), (7, 7), (1, 70)]
OFF_POLICY = hf_reference.random_batch(0, LENGTHS, old_logprobs=True)
ON_POLICY = hf_reference.random_batch(0, LENGTHS, old_logprobs=False)


def exact_logprobs(family: str, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        model = hf_reference.in_float64(hf_reference.tiny_model(family))
        return hf_reference.response_logprobs(model, batch, temperature)


def worst_gradient(actor: Actor, batch: TrainBatch, family: str, temperature: float = 1.0) -> float:
    """The largest relative error of any gradient of the actor's last update."""
    _, wanted = hf_reference.loss_and_gradients(hf_reference.tiny_model(family), batch, temperature)
    found = gradients(actor)
    assert found.keys() == wanted.keys()
    return max(relative_error(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", [family for family in hf_reference.FAMILIES if family not in SEEING])
def test_packed_logprobs_and_gradients_equal_hugging_face_one_by_one(family: str, make_actor: MakeActor) -> None:
    actor = make_actor(family)
    assert (actor.logprobs(OFF_POLICY) - exact_logprobs(family, OFF_POLICY)).abs().max() <= 5e-6
    metrics = actor.update(OFF_POLICY)
    loss, _ = hf_reference.loss_and_gradients(hf_reference.tiny_model(family), OFF_POLICY)
    assert metrics["actor/loss"].value == pytest.approx(loss, abs=2e-6)
    assert worst_gradient(actor, OFF_POLICY, family) <= 2e-6


def test_the_rollout_temperature_divides_the_logits(make_actor: MakeActor) -> None:
    actor, batch = make_actor("qwen3"), replace(OFF_POLICY, temperature=0.7)
    assert (actor.logprobs(batch) - exact_logprobs("qwen3", batch, 0.7)).abs().max() <= 5e-6
    actor.update(batch)
    assert worst_gradient(actor, OFF_POLICY, "qwen3", temperature=0.7) <= 2e-6


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_the_token_budget_does_not_change_the_gradient(budget: int, make_actor: MakeActor) -> None:
    actor = make_actor("qwen3_moe", ppo_max_token_len_per_gpu=budget)
    actor.update(OFF_POLICY)
    assert worst_gradient(actor, OFF_POLICY, "qwen3_moe") <= 2e-6


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recompute_does_not_change_the_gradient(recompute: Recompute, make_actor: MakeActor) -> None:
    actor = make_actor("qwen3_moe", megatron={"use_distributed_optimizer": False, "recompute": recompute})
    actor.update(OFF_POLICY)
    assert worst_gradient(actor, OFF_POLICY, "qwen3_moe") <= 2e-6


def test_advantages_of_one_without_old_logprobs_are_supervised_training(make_actor: MakeActor) -> None:
    batch = replace(ON_POLICY, advantages=torch.ones_like(ON_POLICY.advantages))
    actor = make_actor("llama")
    model = hf_reference.in_float64(hf_reference.tiny_model("llama"))
    likelihood = hf_reference.response_logprobs(model, batch)[batch.loss_mask]
    (-likelihood.mean()).backward()
    actor.update(batch)
    found = gradients(actor)
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) <= 2e-6, name


def test_training_on_supervised_batches_lowers_their_loss(make_actor: MakeActor) -> None:
    batch = replace(ON_POLICY, advantages=torch.ones_like(ON_POLICY.advantages))
    actor = make_actor("qwen3_moe", optim=OptimConfig(lr=1e-2), megatron={}, dtype=Dtype.bf16)
    before = actor.logprobs(batch)[batch.loss_mask].mean()
    for _ in range(5):
        actor.update(batch)
        actor.finish_step()
    assert actor.step == 5
    assert actor.logprobs(batch)[batch.loss_mask].mean() >= before + 0.5


def without_mask(batch: TrainBatch, spec: Any) -> Any:
    return policy_loss_head(replace(batch, loss_mask=torch.ones_like(batch.loss_mask)), spec)


def mean_of_micro_batch_means(batch: TrainBatch, spec: Any) -> Any:
    exact, micro_batches = policy_loss_head(batch, spec), 4

    def head(micro_batch: Any, given: Any) -> Any:
        output = exact(micro_batch, given)
        return replace(output, loss=output.loss * batch.num_loss_tokens / len(micro_batch.tokens) / micro_batches)

    return head


@pytest.mark.parametrize("wrong", [without_mask, mean_of_micro_batch_means])
def test_a_wrong_denominator_is_seen_in_the_gradients(
    wrong: Any, make_actor: MakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = make_actor("llama", ppo_max_token_len_per_gpu=71)
    monkeypatch.setattr(actor_module, "policy_loss_head", wrong)
    actor.update(OFF_POLICY)
    assert worst_gradient(actor, OFF_POLICY, "llama") >= 1e-2


def test_training_on_masked_tokens_is_seen_in_the_gradients(make_actor: MakeActor) -> None:
    actor = make_actor("llama")
    actor.update(replace(OFF_POLICY, loss_mask=torch.ones_like(OFF_POLICY.loss_mask)))
    assert worst_gradient(actor, OFF_POLICY, "llama") >= 1e-2


def test_what_masked_tokens_carry_reaches_nothing(make_actor: MakeActor) -> None:
    dirty = replace(OFF_POLICY, advantages=OFF_POLICY.advantages.masked_fill(~OFF_POLICY.loss_mask, torch.nan))
    actor = make_actor("llama")
    clean_metrics, dirty_metrics = actor.update(OFF_POLICY), actor.update(dirty)
    assert clean_metrics == dirty_metrics


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(bad: float, make_actor: MakeActor) -> None:
    actor = make_actor("llama", optim=OptimConfig(lr=1e-2), megatron={})
    advantages = OFF_POLICY.advantages.clone()
    advantages[OFF_POLICY.loss_mask.nonzero()[0]] = bad
    before = {name: weight.clone() for name, weight in actor.weights()}
    actor.finish_step()
    with pytest.raises(NonFiniteUpdateError, match=r"training step 1: loss .*; the update was not made"):
        actor.update(replace(OFF_POLICY, advantages=advantages))
    for name, weight in actor.weights():
        assert torch.equal(weight, before[name]), name
    actor.update(OFF_POLICY)  # the next one is not poisoned
    assert all(weight.isfinite().all() for _, weight in actor.weights())


def test_a_batch_without_a_trained_token_makes_no_update(make_actor: MakeActor) -> None:
    actor = make_actor("llama", optim=OptimConfig(lr=1e-2), megatron={})
    before = actor.logprobs(OFF_POLICY)
    assert actor.update(replace(OFF_POLICY, loss_mask=torch.zeros_like(OFF_POLICY.loss_mask))) == {}
    assert torch.equal(actor.logprobs(OFF_POLICY), before)


def test_an_empty_prompt_is_refused(make_actor: MakeActor) -> None:
    with pytest.raises(ValueError, match="a prompt of no tokens"):
        make_actor("llama").logprobs(hf_reference.random_batch(0, [(3, 2), (0, 4)], old_logprobs=False))


def test_one_update_per_step_needs_no_old_logprobs(make_actor: MakeActor) -> None:
    assert make_actor("llama").score(ON_POLICY, responses_per_update=6) is ON_POLICY


def test_several_updates_per_step_clip_against_the_policy_before_the_first(make_actor: MakeActor) -> None:
    scored = make_actor("qwen3_moe", dtype=Dtype.bf16).score(ON_POLICY, responses_per_update=4)
    assert scored.old_logprobs is not None
    expected = exact_logprobs("qwen3_moe", ON_POLICY)
    trained = ON_POLICY.loss_mask
    assert (scored.old_logprobs - expected)[trained].abs().mean() <= 0.02
    assert scored.old_logprobs[~trained].eq(0).all()


def test_the_first_update_after_a_recompute_has_a_ratio_of_exactly_one(make_actor: MakeActor) -> None:
    actor = make_actor("qwen3_moe", dtype=Dtype.bf16, old_logprobs=OldLogprobs.recompute)
    for minibatch in actor.score(ON_POLICY, responses_per_update=4).split(4):
        metrics = actor.update(minibatch)
        assert metrics["actor/ratio_mean"].value == 1.0
        assert metrics["actor/kl_old"].value == 0.0


def test_the_engines_logprobs_can_be_the_old_ones(make_actor: MakeActor) -> None:
    scored = make_actor("llama", old_logprobs=OldLogprobs.rollout).score(ON_POLICY, responses_per_update=2)
    assert scored.old_logprobs is ON_POLICY.rollout_logprobs
