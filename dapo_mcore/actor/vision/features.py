"""What the vision tower makes of images: which rank computes it, and how long it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from dapo_mcore.actor.vision.tower import visual_features


class ImageFeatures:
    """Features of images, as `visual_features` has them, whole on every rank.

    A frozen tower computes each image once, and what it says is kept until the step is over or the pixels are gone.
    """

    def __init__(self, tower: PreTrainedModel, ranks: dist.ProcessGroup | None) -> None:
        """`ranks` see the same images and share them out; None: each rank computes all of them."""
        self.tower = tower
        self._ranks = ranks
        self._seen = WeakTensorKeyDictionary()  # pixels -> features
        tower.register_load_state_dict_post_hook(lambda *_: self.forget())

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.tower.parameters())

    def forget(self) -> None:
        self._seen.clear()

    def __call__(self, images: Sequence[Tensor], sizes: Tensor) -> Tensor:
        """[visual tokens, 1 + levels, hidden], image after image. Collective over the ranks that share them, which must
        have been asked for the same before.
        """
        if self.is_trained or not images:
            return self._computed(images, sizes)
        new = [i for i, pixels in enumerate(images) if pixels not in self._seen]
        if new:
            computed = self._computed([images[i] for i in new], sizes[new])
            for i, features in zip(new, computed.split(sizes[new].prod(1).tolist()), strict=True):
                self._seen[images[i]] = features
        return torch.cat([self._seen[pixels] for pixels in images])

    def _computed(self, images: Sequence[Tensor], sizes: Tensor) -> Tensor:
        if self._ranks is None or not images:
            return visual_features(self.tower, images, sizes)
        tokens = sizes.prod(1)
        own = shared_out(tokens.tolist(), self._ranks.size())[self._ranks.rank()]
        features = visual_features(self.tower, [images[i] for i in own], sizes[own])
        is_own = torch.zeros(len(images), dtype=torch.bool)
        is_own[own] = True
        rows = is_own.repeat_interleave(tokens).nonzero()[:, 0].to(features.device)
        whole = features.new_zeros(int(tokens.sum()), *features.shape[1:]).index_copy(0, rows, features)
        return _SumOverRanks.apply(whole, self._ranks)


def shared_out(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """[rank] -> its images, in order: the largest first, each to the rank that has fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for image in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(image)
        loads[rank] += tokens[image]
    return [sorted(share) for share in shares]


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, and of its gradients, too.

    Context-parallel ranks each have a part of the gradient. Tensor-parallel ranks each have the whole, and the tower's
    gradients are averaged over them: tp times the whole of what one rank computed, and nothing elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        dist.all_reduce(values, group=ranks)
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.ranks)
        return gradient, None
