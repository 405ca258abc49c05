"""A pack that mixes text, one image and two images, and what transformers says about it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import HeadInput
from dapo_mcore.types import TrainBatch, Visual, VisualSpan
from tests.tiny_vl import IMAGE, MERGE, PATCH, VOCAB
from tools.certificate.vision import image_inputs

RESPONSE = 8  # tokens; what comes before is the prompt
# Of each sequence its length and its images: (first token, rows, columns). Two show the same image.
SHOWN = [
    (20, []),
    (28, [(3, 2, 4)]),
    (40, [(2, 3, 2), (11, 4, 4)]),
    (24, [(0, 2, 2)]),
    (28, [(3, 2, 4)]),
]
SAME = (1, 4)  # sequences with one and the same prompt


def picture(seed: int, start: int, rows: int, columns: int) -> Visual:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows * columns * MERGE**2, 2 * 3 * PATCH**2, generator=draw)
    return Visual(lambda: pixels, VisualSpan(start, rows, columns))


def mixed_batch() -> TrainBatch:
    """One response holds the placeholder as a sampled token."""
    draw = torch.Generator().manual_seed(3)
    visuals = [tuple(picture(10 * i + j, *span) for j, span in enumerate(spans)) for i, (_, spans) in enumerate(SHOWN)]
    visuals[SAME[1]] = visuals[SAME[0]]
    sequences = []
    for (length, _), shown in zip(SHOWN, visuals, strict=True):
        ids = torch.randint(IMAGE + 1, VOCAB, (length,), generator=draw)
        for visual in shown:
            ids[visual.span.start : visual.span.start + visual.span.num_tokens] = IMAGE
        sequences.append(ids)
    sequences[0][-3] = IMAGE
    lengths = torch.tensor([length for length, _ in SHOWN])
    n = RESPONSE * len(SHOWN)
    return TrainBatch(
        token_ids=torch.cat(sequences),
        prompt_lengths=lengths - RESPONSE,
        response_lengths=torch.full_like(lengths, RESPONSE),
        loss_mask=torch.ones(n, dtype=torch.bool),
        advantages=torch.ones(n),
        rollout_logprobs=torch.zeros(n),
        visuals=tuple(visuals),
    )


def reference_logits(model: Any, batch: TrainBatch) -> list[Tensor]:
    """[tokens, vocabulary] of each sequence, which transformers sees alone."""
    assert batch.visuals is not None
    sequences = batch.token_ids.split([n for n, _ in SHOWN])
    return [
        model(ids[None], **image_inputs(model, ids, visuals)).logits[0]
        for ids, visuals in zip(sequences, batch.visuals, strict=True)
    ]


def all_logits(micro_batch: MicroBatch, given: HeadInput) -> Tensor:
    """A head: [rows, vocabulary] of the rows that are wanted, whole on every rank."""
    local = given.hidden @ given.weight.t()
    if given.group is None:
        return local[:, : given.vocab_size]
    parts = [torch.empty_like(local) for _ in range(given.group.size())]
    dist.all_gather(parts, local, group=given.group)
    return torch.cat(parts, 1)[:, : given.vocab_size]
