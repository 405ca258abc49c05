"""What a vision-language model must know of a micro-batch beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dapo_mcore.actor.vision.positions import mrope_positions
from dapo_mcore.types import Visual


@dataclass(frozen=True, slots=True)
class VisionInputs:
    """Of P tokens on all context-parallel ranks together, V of them visual; an image that several sequences show is
    held once.
    """

    positions: Tensor  # [3, P] int64: time, row and column, each counted within the sequence
    held: Tensor  # [T] int64: places of this rank's tokens among the P
    images: tuple[Tensor, ...]  # pixels of each, [patches, numbers], where the batch has them
    sizes: Tensor  # [images, 2] int64 on the CPU: rows and columns of visual tokens
    where: Tensor  # [V] int64: places of the visual tokens among the P
    features: Tensor  # [V] int64: which of the images' visual tokens each is


def vision_inputs(
    visuals: Sequence[Sequence[Visual]], bounds: Sequence[int], held: Tensor, device: torch.device
) -> VisionInputs:
    """`visuals`: of each sequence; `bounds`: where sequences begin and end, padding between them included."""
    first: dict[int, int] = {}  # identity of an image's pixels -> its first visual token
    distinct: list[Visual] = []
    where, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for begin, of_sequence in zip(bounds, visuals, strict=False):
        for visual in of_sequence:
            if id(visual.pixels) not in first:
                first[id(visual.pixels)] = sum(other.span.num_tokens for other in distinct)
                distinct.append(visual)
            tokens = torch.arange(visual.span.num_tokens)
            where.append(tokens + begin + visual.span.start)
            features.append(tokens + first[id(visual.pixels)])
    lengths = [end - begin for begin, end in pairwise(bounds)]
    spans = [[visual.span for visual in of_sequence] for of_sequence in visuals]
    spans += [[]] * (len(lengths) - len(visuals))  # the filler shows nothing
    positions = [mrope_positions(length, shown) for length, shown in zip(lengths, spans, strict=True)]
    return VisionInputs(
        positions=torch.cat(positions, 1).to(device),
        held=held.to(device),
        images=tuple(visual.pixels for visual in distinct),
        sizes=torch.tensor([(v.span.rows, v.span.columns) for v in distinct], dtype=torch.int64).reshape(-1, 2),
        where=torch.cat(where).to(device),
        features=torch.cat(features).to(device),
    )
