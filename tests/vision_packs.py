"""A pack that mixes text, one image and two images, and what transformers says about it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import HeadInput
from dapo_mcore.types import TrainBatch, Visual, VisualSpan
from tests.tiny_vl import IMAGE, MERGE, PATCH, VOCAB, as_published
from tools.certificate.reference import in_float64

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
    return Visual(pixels, VisualSpan(start, rows, columns))


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
    found = []
    for ids, visuals in zip(batch.token_ids.split([n for n, _ in SHOWN]), batch.visuals, strict=True):
        kinds = torch.zeros_like(ids)
        for visual in visuals:
            kinds[visual.span.start : visual.span.start + visual.span.num_tokens] = 1
        images = {}
        if visuals:
            grids = torch.tensor([(1, MERGE * v.span.rows, MERGE * v.span.columns) for v in visuals])
            pixels = torch.cat([v.pixels for v in visuals]).to(model.dtype)
            images = {"pixel_values": pixels, "image_grid_thw": grids}
        found.append(model(ids[None], mm_token_type_ids=kinds[None], **images).logits[0])
    return found


def reference_gradients(model: Any, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities [N] of the responses, and the gradients of minus their mean by published name, in float64.

    The vision tower has none.
    """
    exact: Any = in_float64(model)
    exact.model.visual.requires_grad_(False)
    logits = reference_logits(exact, batch)
    sequences = batch.token_ids.split([n for n, _ in SHOWN])
    logprobs = torch.cat([
        logits_of[-RESPONSE - 1 : -1].log_softmax(-1).gather(1, ids[-RESPONSE:, None])[:, 0]
        for logits_of, ids in zip(logits, sequences, strict=True)
    ])  # fmt: skip
    (-logprobs.mean()).backward()
    zero = {name: torch.zeros_like(tensor) for name, tensor in exact.state_dict().items()}
    trained = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    return logprobs.detach(), as_published(zero | trained)


def all_logits(micro_batch: MicroBatch, given: HeadInput) -> Tensor:
    """A head: [rows, vocabulary] of the rows that are wanted, whole on every rank."""
    local = given.hidden @ given.weight.t()
    if given.group is None:
        return local[:, : given.vocab_size]
    parts = [torch.empty_like(local) for _ in range(given.group.size())]
    dist.all_gather(parts, local, group=given.group)
    return torch.cat(parts, 1)[:, : given.vocab_size]
