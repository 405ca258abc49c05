"""The loss head against verl, TRL and Liger, on stored inputs: losses and gradients, in float64."""

import math
from functools import partial

import pytest
import torch
from dapo_kernels import (
    KLEstimator,
    PolicyLoss,
    PolicyLossSpec,
    fused_linear_policy_loss,
    fused_policy_loss_from_logits,
)

from dapo_mcore.algo import aggregation
from dapo_mcore.types import TrainBatch

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def policy_loss(
    logprobs, mask, spec, *, advantages=None, backend, scale=None, token_weights=None, old=None, ref=None
) -> PolicyLoss:
    """The loss head on [B, T] log-probabilities: a vocabulary of two, of which token 0 was sampled."""
    logits = torch.stack([logprobs, torch.log1p(-logprobs.exp())], dim=-1).flatten(0, 1)
    if advantages is None:
        advantages = torch.zeros(len(mask), dtype=torch.float64)

    def flat(values):
        return None if values is None else values.expand_as(mask).flatten()

    return fused_policy_loss_from_logits(
        logits, torch.zeros(len(logits), dtype=torch.int64), flat(advantages[:, None]), flat(mask), spec,
        old_logprobs=flat(old), ref_logprobs=flat(ref), token_weights=flat(token_weights),
        scale=1.0 / int(mask.sum()) if scale is None else scale, backend=backend,
    )  # fmt: skip


def assert_same(out: PolicyLoss, answers, name: str, rtol=1e-7, **leaves: torch.Tensor) -> None:
    """Loss and gradients, to `rtol` of their size."""
    gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    ours = {"loss": out.loss.detach()} | {f"gradient.{leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
    for what, value in ours.items():
        theirs = answers[f"{name}.{what}"]
        size = theirs.abs().max().item()
        assert size > 0
        torch.testing.assert_close(value, theirs, rtol=0, atol=rtol * size, check_dtype=False)


def weights_and_scale(mode: str, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of padded responses, [B, T] and a number."""
    aggregate = {
        "token-mean": aggregation.token_mean,
        "seq-mean-token-sum": aggregation.seq_mean_token_sum,
        "seq-mean-token-mean": aggregation.seq_mean_token_mean,
        "seq-mean-token-sum-norm": partial(aggregation.token_sum_norm, scale_factor=mask.shape[1]),
    }[mode]
    weights, denominator = aggregate(padded_batch(mask))
    return weights.view_as(mask).double(), 1 / denominator


def padded_batch(mask: torch.Tensor) -> TrainBatch:
    """Responses of the same length, of which the mask takes what it wants."""
    responses, length = mask.shape
    zeros = torch.zeros(mask.numel())
    lengths = torch.full((responses,), length)
    return TrainBatch(torch.zeros(responses * length, dtype=torch.int64), 0 * lengths, lengths, mask.flatten(), zeros,
                      zeros)  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("c", [3.0, 10.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_clipped_loss_and_its_gradient_are_those_of_verl(oracle, mode, c, backend):
    verl = oracle("verl")
    mask, logprobs = verl["input.mask"], verl["input.logprobs"].requires_grad_()
    weights, scale = weights_and_scale(mode, mask)
    out = policy_loss(
        logprobs, mask, PolicyLossSpec(clip_ratio_c=c), advantages=verl["input.advantages"],
        old=verl["input.old_logprobs"], token_weights=weights, scale=scale, backend=backend,
    )  # fmt: skip
    assert_same(out, verl, f"policy.{mode}.c{c:g}", rtol=3e-7, logprobs=logprobs)  # weights are in float32


@pytest.mark.parametrize("c", [3.0, 10.0])
def test_clip_fractions_and_the_distance_to_the_old_policy_are_those_of_verl(oracle, c):
    verl = oracle("verl")
    out = policy_loss(
        verl["input.logprobs"], verl["input.mask"], PolicyLossSpec(clip_ratio_c=c), backend="torch",
        advantages=verl["input.advantages"], old=verl["input.old_logprobs"],
    )  # fmt: skip
    share = {name: (total / out.stats["num_tokens"]).item() for name, total in out.stats.items()}
    assert share["clip_low"] + share["clip_high"] == pytest.approx(verl[f"policy.c{c:g}.clip_fraction"].item())
    assert share["clip_dual"] == pytest.approx(verl[f"policy.c{c:g}.dual_clip_fraction"].item())
    assert share["old_kl"] == pytest.approx(verl["policy.ppo_kl"].item())


def test_parts_of_a_batch_that_share_its_denominator_add_up_to_the_loss_of_verl(oracle):
    verl = oracle("verl")
    mask, logprobs = verl["input.mask"], verl["input.logprobs"]
    total = sum(
        policy_loss(
            logprobs[rows], mask[rows], PolicyLossSpec(clip_ratio_c=3.0), advantages=verl["input.advantages"][rows],
            old=verl["input.old_logprobs"][rows], scale=1 / int(mask.sum()), backend="torch",
        ).loss
        for rows in (slice(0, 3), slice(3, 10), slice(10, None))
    )  # fmt: skip
    torch.testing.assert_close(total, verl["policy.token-mean.c3.loss"], rtol=1e-7, atol=0)


def test_each_of_two_ranks_computes_what_a_rank_of_verl_does(oracle):
    verl = oracle("verl")
    mask, spec = verl["input.mask"], PolicyLossSpec(kl_coeff=1.0, kl_estimator=KLEstimator.K2)
    for rank, rows in enumerate((slice(0, len(mask) // 2), slice(len(mask) // 2, None))):
        loss = policy_loss(
            verl["input.logprobs"][rows], mask[rows], spec, ref=verl["input.ref_logprobs"][rows],
            scale=2 / int(mask.sum()), backend="torch",
        ).loss  # fmt: skip
        torch.testing.assert_close(loss, verl[f"kl.k2.rank{rank}"], rtol=1e-9, atol=0)


@BACKENDS
@pytest.mark.parametrize(
    ("estimator", "asked", "ref"),
    [
        (KLEstimator.K1, "k1", "ref"),
        (KLEstimator.K2, "k2", "ref"),
        (KLEstimator.K3, "k3", "ref"),
        (KLEstimator.LOW_VAR, "k3", "ref"),
        (KLEstimator.LOW_VAR, "k3.far", "far_ref"),
    ],
)
def test_the_kl_penalty_and_its_gradient_are_those_of_verl(oracle, estimator, asked, ref, backend):
    verl = oracle("verl")
    logprobs = verl["input.logprobs"].requires_grad_()
    spec = PolicyLossSpec(kl_coeff=1.0, kl_estimator=estimator)
    out = policy_loss(logprobs, verl["input.mask"], spec, ref=verl[f"input.{ref}_logprobs"], backend=backend)
    assert_same(out, verl, f"kl.{asked}", logprobs=logprobs)


def test_the_stored_far_reference_reaches_the_bound_of_the_low_variance_estimator(oracle):
    verl = oracle("verl")
    difference = verl["input.logprobs"] - verl["input.far_ref_logprobs"]
    assert ((torch.exp(-difference) - 1 + difference > 10) & verl["input.mask"]).sum() >= 2


@BACKENDS
def test_the_entropy_bonus_and_its_gradient_are_those_of_verl(oracle, backend):
    verl = oracle("verl")
    mask, logits = verl["input.entropy.mask"], verl["input.entropy.logits"].requires_grad_()
    out = fused_policy_loss_from_logits(
        logits.flatten(0, 1), torch.zeros(mask.numel(), dtype=torch.int64), torch.zeros(mask.numel()).double(),
        mask.flatten(), PolicyLossSpec(entropy_coeff=1.0), scale=-1 / int(mask.sum()), backend=backend,
    )  # fmt: skip
    assert_same(out, verl, "entropy", logits=logits)


@BACKENDS
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("plain", PolicyLossSpec(clip_ratio_c=math.inf)),
        ("dual_clip", PolicyLossSpec(clip_ratio_c=3.0)),
        ("kl", PolicyLossSpec(clip_ratio_c=3.0, kl_coeff=0.04)),
    ],
)
def test_the_dapo_loss_and_its_gradient_are_those_of_trl(oracle, name, spec, backend):
    trl = oracle("trl")
    logprobs = trl["input.logprobs"].requires_grad_()
    ref = trl["input.ref_logprobs"] if spec.kl_coeff else None
    out = policy_loss(
        logprobs, trl["input.mask"], spec, advantages=trl["input.advantages"], old=trl["input.old_logprobs"], ref=ref,
        backend=backend,
    )  # fmt: skip
    assert_same(out, trl, f"policy.{name}", logprobs=logprobs)


@BACKENDS
@pytest.mark.parametrize(("name", "kl_coeff"), [("policy", 0.0), ("kl", 0.04)])
def test_the_fused_head_gives_the_loss_and_gradients_of_liger(oracle, name, kl_coeff, backend):
    liger = oracle("liger-kernel")
    mask = liger["input.mask"]
    hidden, weight = liger["input.hidden"].requires_grad_(), liger["input.weight"].requires_grad_()
    out = fused_linear_policy_loss(
        hidden.flatten(0, 1), weight, liger["input.targets"].flatten(),
        liger["input.advantages"][:, None].expand_as(mask).flatten(), mask.flatten(),
        PolicyLossSpec(clip_ratio_c=3.0, temperature=0.7, kl_coeff=kl_coeff),
        old_logprobs=liger["input.old_logprobs"].flatten(),
        ref_logprobs=liger["input.ref_logprobs"].flatten() if kl_coeff else None,
        scale=1 / int(mask.sum()), backend=backend,
    )  # fmt: skip
    assert_same(out, liger, name, rtol=1e-6, hidden=hidden, weight=weight)  # Liger adds up in float32


@BACKENDS
def test_what_masked_tokens_hold_changes_neither_loss_nor_gradient(oracle, backend):
    verl = oracle("verl")
    mask, logprobs = verl["input.mask"], verl["input.logprobs"].requires_grad_()
    garbage = torch.where(mask, verl["input.old_logprobs"], math.nan)
    out = policy_loss(
        logprobs, mask, PolicyLossSpec(clip_ratio_c=3.0), advantages=verl["input.advantages"], old=garbage,
        backend=backend,
    )  # fmt: skip
    assert_same(out, verl, "policy.token-mean.c3", logprobs=logprobs)
