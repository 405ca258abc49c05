"""The random inputs that every peer is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Values = dict[str, Tensor]

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
DUAL_CLIPS = (3.0, 10.0)


@dataclass(frozen=True)
class Batch:
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B]
    logprobs: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]

    def values(self) -> Values:
        return {f"input.{name}": tensor for name, tensor in vars(self).items()}


def response_mask(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random lengths; one token in ten masked inside a response; two responses masked as a whole."""
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths) & (torch.rand(rows, columns, generator=generator) > 0.1)
    mask[2] = mask[-1] = False
    return mask


def draw_batch(rows: int = 16, columns: int = 24, seed: int = 1) -> Batch:
    """Ratios inside the clip range, beyond both of its ends, and beyond both dual clips, for either sign of A."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -0.01 - 4 * torch.rand(rows, columns, generator=g)
    spread = torch.tensor([0.1, 0.5, 2.0])[torch.randint(3, (rows, columns), generator=g)]
    old = logprobs + spread * torch.randn(rows, columns, generator=g)
    ref = logprobs + 0.5 * torch.randn(rows, columns, generator=g)
    batch = Batch(
        response_mask(rows, columns, g), torch.randn(rows, generator=g).double(), logprobs.double(), old.double(),
        ref.double(),
    )  # fmt: skip
    check_coverage(batch)
    return batch


def check_coverage(batch: Batch) -> None:
    ratio, negative = (batch.logprobs - batch.old_logprobs).exp(), (batch.advantages < 0)[:, None]
    cases = (
        ~negative & (ratio > 1 + CLIP_HIGH), ~negative & (ratio < 1 - CLIP_LOW), negative & (ratio < 1 - CLIP_LOW),
        negative & (ratio > 1 + CLIP_HIGH), *(negative & (ratio > c) for c in DUAL_CLIPS),
    )  # fmt: skip
    assert all((case & batch.mask).sum() >= 2 for case in cases), "a clip case is missing: take another seed"


def with_gradient(name: str, loss_of: Callable[..., Tensor], **leaves: Tensor) -> Values:
    """The loss, and its gradient by every leaf."""
    variables = {leaf: tensor.clone().requires_grad_() for leaf, tensor in leaves.items()}
    loss = loss_of(**variables)
    gradients = torch.autograd.grad(loss, list(variables.values()))
    return {f"{name}.loss": loss.detach()} | {
        f"{name}.gradient.{leaf}": g for leaf, g in zip(variables, gradients, strict=True)
    }


def draw_groups(count: int = 24) -> tuple[Tensor, Tensor]:
    """Rewards and group numbers of groups of 2 to 16: correctness, length terms, equal groups, and one crumb."""
    g = torch.Generator().manual_seed(3)
    sizes = torch.randint(2, 17, (count,), generator=g)
    rewards = [(torch.randint(2, (n,), generator=g) * 2.0 - 1 - 0.5 * torch.rand(n, generator=g)) for n in sizes]
    rewards[0], rewards[1], rewards[2] = torch.ones(8), torch.full((7,), 0.7), torch.ones(16)
    rewards[2][0] -= 20 / 4096
    return torch.cat(rewards).double(), torch.arange(count).repeat_interleave(torch.tensor([len(r) for r in rewards]))
