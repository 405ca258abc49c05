"""Supervised training of the tiny model by the Megatron actor, so that reinforcement learning finds something to do.

First it learns to show the work; towards the end it mostly sees bare answers, which it gets wrong. What remains is a
policy that can do the sums and seldom does: a quarter of its samples are worked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dapo_mcore.types import TrainBatch
from tools.tiny.arithmetic import bare, worked


@dataclass(frozen=True, slots=True)
class WarmStart:
    steps: int = 600
    batch_size: int = 64
    lr: float = 5e-3  # AdamW, linear decay
    min_lr: float = 5e-4
    lr_warmup_steps: int = 20
    beta2: float = 0.95
    weight_decay: float = 0.01
    worked_only: float = 0.75  # share of the steps in which every demonstration is worked
    worked_share: float = 0.3  # of the demonstrations afterwards

    def share_at(self, step: int) -> float:
        """Of the demonstrations of a step: how many are worked."""
        return 1.0 if step < self.worked_only * self.steps else self.worked_share


# After a warm start: the work is hardly ever shown, but no skill is lost.
RARE = WarmStart(steps=60, lr=1e-3, min_lr=1e-4, worked_only=0.0, worked_share=0.03)


def demonstrations(
    problems: Sequence[dict[str, Any]], step: int, recipe: WarmStart, draw: random.Random
) -> list[tuple[str, str]]:
    """(question, response) of one step's batch."""
    chosen = draw.sample(problems, recipe.batch_size)
    return [(p["question"], worked(p) if draw.random() < recipe.share_at(step) else bare(p)) for p in chosen]


def supervised_batch(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> TrainBatch:
    """A batch whose DAPO loss has the gradient of the mean negative log-likelihood: advantages of 1, on-policy.

    rollout_logprobs are 0, so that the actor's `mismatch_abs` is that likelihood.
    """
    prompts = [tokenizer(question).input_ids for question, _ in pairs]
    responses = [[*tokenizer(response).input_ids, tokenizer.eos_token_id] for _, response in pairs]
    num_tokens = sum(len(response) for response in responses)
    ids = [token for prompt, response in zip(prompts, responses, strict=True) for token in (*prompt, *response)]
    return TrainBatch(
        token_ids=torch.tensor(ids),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths=torch.tensor([len(response) for response in responses]),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        advantages=torch.ones(num_tokens),
        rollout_logprobs=torch.zeros(num_tokens),
    )


def train(
    update: Callable[[TrainBatch], float],
    problems: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    recipe: WarmStart,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Every rank runs this with the same arguments.

    Args:
        update: makes one optimizer update and returns the mean negative log-likelihood before it, in nats.
        report: gets the number of finished steps and that loss.
    """
    draw = random.Random(seed)
    for step in range(recipe.steps):
        pairs = demonstrations(problems, step, recipe, draw)
        report(step + 1, update(supervised_batch(pairs, tokenizer)))
