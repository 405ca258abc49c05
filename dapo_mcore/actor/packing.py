"""The tensors that the sequences of a micro-batch become on one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_mcore.actor.vision.inputs import VisionInputs, vision_inputs
from dapo_mcore.types import TrainBatch
from dapo_mcore.zigzag import zigzag_positions


@dataclass(frozen=True, slots=True)
class Origin:
    """What routers must know of this rank's T tokens."""

    response: Tensor  # [T] int64: which of the micro-batch's responses a token belongs to; `len(lengths)`: padding
    lengths: Tensor  # [responses] int64: prompt and response tokens of each, without padding, on all ranks together
    routes: Tensor | None  # [T, layers, top_k] int64: experts the engine chose; padding goes to the first top_k
    batch_responses: int  # of all micro-batches and ranks
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end: this rank's T tokens of them.

    R response tokens wanted of these, at places `tokens` of the batch's N.
    """

    input_ids: Tensor  # [1, T] int64
    packed: PackedSeqParams  # limits of the sequences, whole
    rows: Tensor  # [R] int64: the position before each wanted token, whose hidden state predicts it
    targets: Tensor  # [R] int64: the wanted tokens' ids
    tokens: Tensor  # [R] int64: their places among the N response tokens of the batch
    origin: Origin
    vision: VisionInputs


@dataclass(frozen=True, slots=True)
class Cut:
    """How the tokens of a micro-batch are spread over context and sequence parallel ranks."""

    context_size: int = 1
    context_rank: int = 0
    sequence_size: int = 1  # tensor-parallel ranks that share this rank's tokens

    @property
    def sequence_multiple(self) -> int:
        """What the length of each sequence must be a multiple of: the zigzag cuts it into that many chunks."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        return math.lcm(self.sequence_multiple, self.context_size * self.sequence_size)


def pack(batch: TrainBatch, sequences: Sequence[int], wanted: Tensor, cut: Cut, device: torch.device) -> MicroBatch:
    """The responses `sequences` of the batch as one micro-batch, of which this rank has its part.

    Sequences end in padding where the cut demands it, which no token before can see; the total is filled up with a
    sequence of its own that nothing is wanted of. Targets are found before the cut.

    Args:
        wanted: [N] bool, the response tokens whose log-probability is needed.
    """
    totals = batch.prompt_lengths + batch.response_lengths
    starts, response_starts = totals.cumsum(0) - totals, batch.response_lengths.cumsum(0) - batch.response_lengths
    ids, rows, tokens, places, bounds = [], [], [], [], [0]
    for i in sequences:
        start, total, prompt = int(starts[i]), int(totals[i]), int(batch.prompt_lengths[i])
        padding = -total % cut.sequence_multiple
        ids += [batch.token_ids[start : start + total], torch.zeros(padding, dtype=torch.int64)]
        places += [torch.arange(start, start + total), torch.full((padding,), -1)]
        rows.append(torch.arange(prompt, total) + (bounds[-1] - 1))
        tokens.append(torch.arange(total - prompt) + response_starts[i])
        bounds.append(bounds[-1] + total + padding)
    filler = -bounds[-1] % cut.total_multiple if bounds[-1] else cut.total_multiple
    if filler:
        ids.append(torch.zeros(filler, dtype=torch.int64))
        places.append(torch.full((filler,), -1))
        bounds.append(bounds[-1] + filler)
    row, token = (torch.cat([torch.empty(0, dtype=torch.int64), *parts]) for parts in (rows, tokens))
    row, token = row[wanted[token]], token[wanted[token]]
    input_ids, place = torch.cat(ids), torch.cat(places)
    targets = input_ids[row + 1]
    held = torch.arange(len(input_ids))
    if cut.context_size > 1:
        held = zigzag_positions(bounds, cut.context_size, cut.context_rank)
        here = torch.full_like(input_ids, -1)  # where each position lies on this rank; -1: on another
        here[held] = torch.arange(len(held))
        mine = here[row] >= 0
        input_ids, place = input_ids[held], place[held]
        row, targets, token = here[row][mine], targets[mine], token[mine]
    return MicroBatch(
        input_ids=input_ids[None].to(device),
        packed=_packed_seq_params(bounds, device),
        rows=row.to(device),
        targets=targets.to(device),
        tokens=token,
        origin=_origin(batch, sequences, place, device),
        vision=vision_inputs([batch.visuals[i] if batch.visuals else () for i in sequences], bounds, held, device),
    )


def _origin(batch: TrainBatch, sequences: Sequence[int], places: Tensor, device: torch.device) -> Origin:
    """places: [T] int64, of this rank's tokens among the L tokens of the batch; -1: padding."""
    totals, is_padding = batch.prompt_lengths + batch.response_lengths, places < 0
    number = torch.zeros(len(batch), dtype=torch.int64)  # of each of the batch's responses within the micro-batch
    number[list(sequences)] = torch.arange(len(sequences))
    number = torch.cat([number, torch.tensor([len(sequences)])])
    response = torch.searchsorted(totals.cumsum(0), places, right=True).masked_fill(is_padding, len(batch))
    routes = None
    if batch.routes is not None:
        routes = batch.routes[places.clamp(min=0)].long()
        routes[is_padding] = torch.arange(routes.shape[-1])
        routes = routes.to(device)
    return Origin(
        response=number[response].to(device),
        lengths=totals[list(sequences)].to(device),
        routes=routes,
        batch_responses=len(batch),
        batch_tokens=len(batch.token_ids),
    )


def _packed_seq_params(bounds: list[int], device: torch.device) -> PackedSeqParams:
    limits = torch.tensor(bounds, dtype=torch.int32)
    longest = int(limits.diff().max())
    limits = limits.to(device)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=limits, cu_seqlens_kv=limits, max_seqlen_q=longest, max_seqlen_kv=longest
    )
