"""Groups -> TrainBatch: rewards become advantages, responses become flat token tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dapo_mcore.algo.advantage import group_advantages
from dapo_mcore.algo.reward import overlong_penalty, shaped_rewards
from dapo_mcore.config import AlgorithmConfig, DataConfig, RewardConfig
from dapo_mcore.types import FinishReason, Group, Outcome, Sample, TrainBatch


def make_batch(
    groups: Sequence[Group], algorithm: AlgorithmConfig, reward: RewardConfig, data: DataConfig
) -> TrainBatch:
    """The trainable form of `groups`, their responses in order. Every mask is final here.

    Raises ValueError for no groups, and for a score that is not finite.
    """
    if not groups:
        raise ValueError("no groups to train on: no prompt of this step passed algorithm.filter_groups")
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    responses = [sample.response for _, sample in samples]
    lengths = torch.tensor([len(response.token_ids) for response in responses])
    trained = torch.tensor([_is_trained(sample, algorithm.overlong_filtering) for _, sample in samples])
    penalty = _length_penalty(reward, data.max_response_length)
    advantages = torch.cat([_response_advantages(group, penalty, algorithm) for group in groups])
    return TrainBatch(
        token_ids=torch.tensor([t for prompt, s in samples for t in (*prompt.token_ids, *s.response.token_ids)]),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt, _ in samples]),
        response_lengths=lengths,
        loss_mask=trained.repeat_interleave(lengths),
        advantages=advantages.repeat_interleave(lengths),
        rollout_logprobs=torch.tensor([x for response in responses for x in response.logprobs], dtype=torch.float32),
    )


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


def _is_graded(sample: Sample) -> bool:
    return sample.verdict.outcome is Outcome.GRADED


def _is_trained(sample: Sample, overlong_filtering: bool) -> bool:
    truncated = sample.response.finish_reason is FinishReason.LENGTH
    return _is_graded(sample) and not (overlong_filtering and truncated)


def _response_advantages(
    group: Group, length_penalty: Callable[[Tensor], Tensor], algorithm: AlgorithmConfig
) -> Tensor:
    """[G] float32. Truncated responses count in mean and deviation; ungraded ones do not, and get 0."""
    rewards = shaped_rewards(group, length_penalty)
    graded = torch.tensor([_is_graded(sample) for sample in group.samples])
    if not rewards[graded].isfinite().all():
        raise ValueError(
            f"reward.verifier gave scores {rewards.tolist()} (with the length term) to row {group.prompt.row}: "
            "they must be finite numbers; mend the verifier, or let it raise so that the response counts as not graded"
        )
    advantages = torch.zeros(len(rewards))
    advantages[graded] = group_advantages(rewards[graded], algorithm.norm_adv_by_std_in_grpo, algorithm.std_ddof)
    return advantages
