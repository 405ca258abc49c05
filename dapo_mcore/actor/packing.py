"""TrainBatch -> packed micro-batches: which sequences run together on which rank, and the tensors they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_mcore.types import TrainBatch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end. T tokens; R response tokens wanted of it, at places `tokens` of the batch's N."""

    input_ids: Tensor  # [1, T] int64
    packed: PackedSeqParams  # limits of the sequences
    rows: Tensor  # [R] int64: the position before each wanted token, whose hidden state predicts it
    targets: Tensor  # [R] int64: the wanted tokens' ids
    tokens: Tensor  # [R] int64: their places among the N response tokens of the batch


def deal(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Sequences dealt over data-parallel ranks: [rank][micro-batch] -> places in `lengths`. Deterministic.

    Ranks are balanced by tokens. A micro-batch holds at most `budget` tokens; a longer sequence has one of its own.
    Every rank gets the same number of micro-batches, some of them empty if need be: ranks that share experts meet in
    every layer of every micro-batch.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += lengths[i]
    dealt = [_first_fit(share, lengths, budget) for share in shares]
    rounds = max(1, *(len(micro_batches) for micro_batches in dealt))
    return [micro_batches + [[] for _ in range(rounds - len(micro_batches))] for micro_batches in dealt]


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for i in longest_first:
        which = next((k for k, free in enumerate(room) if free >= lengths[i]), len(room))
        if which == len(room):
            micro_batches.append([])
            room.append(budget)
        micro_batches[which].append(i)
        room[which] -= lengths[i]
    return [sorted(micro_batch) for micro_batch in micro_batches]


def pack(
    batch: TrainBatch, sequences: Sequence[int], wanted: Tensor, total_multiple: int, device: torch.device
) -> MicroBatch:
    """The responses `sequences` of the batch as one micro-batch.

    Args:
        wanted: [N] bool, the response tokens whose log-probability is needed.
        total_multiple: what T must be a multiple of; filled up with a sequence of its own that nothing is wanted of.
    """
    totals = batch.prompt_lengths + batch.response_lengths
    starts, response_starts = totals.cumsum(0) - totals, batch.response_lengths.cumsum(0) - batch.response_lengths
    ids, rows, tokens, bounds = [], [], [], [0]
    for i in sequences:
        start, total, prompt = int(starts[i]), int(totals[i]), int(batch.prompt_lengths[i])
        ids.append(batch.token_ids[start : start + total])
        rows.append(torch.arange(prompt, total) + (bounds[-1] - 1))
        tokens.append(torch.arange(total - prompt) + response_starts[i])
        bounds.append(bounds[-1] + total)
    filler = -bounds[-1] % total_multiple if bounds[-1] else total_multiple
    if filler:
        ids.append(torch.zeros(filler, dtype=torch.int64))
        bounds.append(bounds[-1] + filler)
    row, token = (torch.cat([torch.empty(0, dtype=torch.int64), *parts]) for parts in (rows, tokens))
    row, token = row[wanted[token]], token[wanted[token]]
    input_ids = torch.cat(ids)
    return MicroBatch(
        input_ids=input_ids[None].to(device),
        packed=_packed_seq_params(bounds, device),
        rows=row.to(device),
        targets=input_ids[row + 1].to(device),
        tokens=token,
    )


def _packed_seq_params(bounds: list[int], device: torch.device) -> PackedSeqParams:
    limits = torch.tensor(bounds, dtype=torch.int32)
    longest = int(limits.diff().max())
    limits = limits.to(device)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=limits, cu_seqlens_kv=limits, max_seqlen_q=longest, max_seqlen_kv=longest
    )
