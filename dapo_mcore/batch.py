"""Groups -> TrainBatch: rewards become advantages, responses become flat token tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from dapo_kernels import KLEstimator
from dapo_kernels.policy import kl_estimate
from torch import Tensor

from dapo_mcore.algo import advantage
from dapo_mcore.algo.advantage import Estimator
from dapo_mcore.algo.reward import overlong_penalty, shaped_rewards
from dapo_mcore.config import AdvEstimator, AlgorithmConfig, DataConfig, RewardConfig
from dapo_mcore.types import FinishReason, Group, Outcome, PixelsOf, Response, Sample, TrainBatch, Visual


def make_batch(
    groups: Sequence[Group],
    algorithm: AlgorithmConfig,
    reward: RewardConfig,
    data: DataConfig,
    pixels_of: PixelsOf | None = None,
) -> TrainBatch:
    """The trainable form of `groups`, their responses in order. Every mask is final here.

    No groups make an empty batch, of which `split` makes no updates. `pixels_of` makes a picture's [patches, numbers]
    float32; None where no prompt has pictures.

    Raises ValueError for a score that is not finite.
    """
    if not groups:
        return _empty_batch()
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    responses = [sample.response for _, sample in samples]
    lengths = torch.tensor([len(response.token_ids) for response in responses])
    trained = torch.tensor([_is_trained(sample, algorithm.overlong_filtering) for _, sample in samples])
    penalty = _length_penalty(reward, data.max_response_length)
    batch = TrainBatch(
        token_ids=torch.tensor([t for prompt, s in samples for t in (*prompt.expanded_ids, *s.response.token_ids)]),
        prompt_lengths=torch.tensor([prompt.length for prompt, _ in samples]),
        response_lengths=lengths,
        loss_mask=trained.repeat_interleave(lengths),
        advantages=torch.zeros(int(lengths.sum())),
        rollout_logprobs=torch.tensor([x for response in responses for x in response.logprobs], dtype=torch.float32),
        routes=routes_of(responses),
        rewards=torch.cat([_graded_rewards(group, penalty) for group in groups]),
        groups=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.samples) for group in groups])),
        visuals=_visuals(groups, pixels_of),
    )
    return with_advantages(batch, algorithm)


def _empty_batch() -> TrainBatch:
    integers, numbers = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return TrainBatch(integers, integers, integers, integers.bool(), numbers, numbers)


def with_advantages(batch: TrainBatch, algorithm: AlgorithmConfig) -> TrainBatch:
    """The batch with the advantages of its rewards: the same for every token of a response, 0 where not graded."""
    assert batch.rewards is not None
    assert batch.groups is not None
    advantages = _estimator(algorithm)(batch.rewards, batch.groups, batch.trained_lengths)
    return replace(batch, advantages=advantages.repeat_interleave(batch.response_lengths))


def with_kl_in_rewards(batch: TrainBatch, algorithm: AlgorithmConfig) -> TrainBatch:
    """The batch with kl_coef times the KL of old policy and reference taken from its rewards, and their advantages.

    The KL of a response is the sum of the estimates of its trained tokens (InstructGPT, arXiv:2203.02155; verl's
    use_kl_in_reward with a fixed coefficient).
    """
    assert batch.rewards is not None
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    estimates = kl_estimate(batch.old_logprobs, batch.ref_logprobs, KLEstimator(algorithm.kl_penalty.value))
    kl = batch.sum_by_response(torch.where(batch.loss_mask, estimates, 0.0))
    return with_advantages(replace(batch, rewards=batch.rewards - algorithm.kl_ctrl.kl_coef * kl), algorithm)


def _estimator(algorithm: AlgorithmConfig) -> Estimator:
    by_std, ddof = algorithm.norm_adv_by_std_in_grpo, algorithm.std_ddof
    of_group = partial(advantage.group_advantages, normalize_by_std=by_std, ddof=ddof)
    return {
        AdvEstimator.grpo: advantage.per_group(of_group),
        AdvEstimator.rloo: advantage.per_group(advantage.leave_one_out_advantages),
        AdvEstimator.reinforce_plus_plus_baseline: advantage.whitened_group_differences,
    }[algorithm.adv_estimator]


def shuffle(batch: TrainBatch, seed: int, step: int) -> TrainBatch:
    """The responses in an order drawn from (seed, step) alone, so that a resumed run cuts the same mini-batches.

    Responses, not groups, are spread over the mini-batches (verl keeps the order of the prompts unless told otherwise).
    """
    order = list(range(len(batch)))
    random.Random(f"{seed}/{step}").shuffle(order)
    return batch.select(order)


def _length_penalty(reward: RewardConfig, max_response_length: int) -> Callable[[Tensor], Tensor]:
    buffer = reward.overlong_buffer
    if not buffer.enable:
        return torch.zeros_like
    return partial(
        overlong_penalty,
        max_response_length=max_response_length,
        buffer_len=buffer.len,
        penalty_factor=buffer.penalty_factor,
    )


def routes_of(responses: Sequence[Response]) -> Tensor | None:
    """[L, layers, top_k]; the last token of a response, which no model has read, goes where the one before went."""
    parts = [np.concatenate([r.routes, r.routes[-1:]]) for r in responses if r.routes is not None]
    return torch.from_numpy(np.concatenate(parts)) if len(parts) == len(responses) else None


def _is_graded(sample: Sample) -> bool:
    return sample.verdict.outcome is Outcome.GRADED


def _visuals(groups: Sequence[Group], pixels_of: PixelsOf | None) -> tuple[tuple[Visual, ...], ...] | None:
    """[S]: one tuple for all responses to a prompt; equal pictures have their pixels in common, once a rank that
    computes on them asks.
    """
    images = dict.fromkeys(image for group in groups for image in group.prompt.images)
    if not images:
        return None
    assert pixels_of is not None
    pixels = {image: cache(partial(pixels_of, image)) for image in images}
    shown = [
        tuple(Visual(pixels[image], span) for image, span in zip(prompt.images, prompt.visual_spans, strict=True))
        for prompt in (group.prompt for group in groups)
    ]
    return tuple(visuals for group, visuals in zip(groups, shown, strict=True) for _ in group.samples)


def _is_trained(sample: Sample, overlong_filtering: bool) -> bool:
    truncated = sample.response.finish_reason is FinishReason.LENGTH
    return _is_graded(sample) and not (overlong_filtering and truncated)


def _graded_rewards(group: Group, length_penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """[G] float32: of truncated responses too, and NaN where there is no grade."""
    rewards = shaped_rewards(group, length_penalty)
    graded = torch.tensor([_is_graded(sample) for sample in group.samples])
    if not rewards[graded].isfinite().all():
        raise ValueError(
            f"reward.verifier gave scores {rewards.tolist()} (with the length term) to row {group.prompt.row}: "
            "they must be finite numbers; mend the verifier, or let it raise so that the response counts as not graded"
        )
    return torch.where(graded, rewards, torch.nan)
