"""Which data-parallel rank computes which sequence, in which micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

Cost = Callable[[int], float]  # length of a sequence in tokens -> estimated FLOPs of its forward


@dataclass(frozen=True, slots=True)
class Deal:
    """Sequences dealt over ranks."""

    shares: list[list[list[int]]]  # [rank][micro-batch] -> places of the sequences
    costs: list[float]  # [rank], FLOPs

    @property
    def mean_cost(self) -> float:
        return sum(self.costs) / len(self.costs)


def sequence_cost(config: TransformerConfig, vocab_size: int) -> Cost:
    """Matrix products of the layers and the head grow with the length, causal attention with its square."""
    hidden, heads = config.hidden_size, config.num_attention_heads * (config.kv_channels or 0)
    kv_heads = (config.num_query_groups or config.num_attention_heads) * (config.kv_channels or 0)
    layers = config.num_layers
    moe = _moe_layers(config)
    expert_size = (config.moe_ffn_hidden_size or 0) * config.moe_router_topk
    mlp = 3 * hidden * (moe * expert_size + (layers - moe) * (config.ffn_hidden_size or 0))
    weights = layers * 2 * hidden * (heads + kv_heads) + mlp + hidden * vocab_size
    per_token, per_pair = (
        2.0 * weights,
        2.0 * layers * heads,
    )  # score and weighted value of half the pairs
    return lambda length: per_token * length + per_pair * length**2


def _moe_layers(config: TransformerConfig) -> int:
    if not config.num_moe_experts:
        return 0
    frequency = config.moe_layer_freq
    return sum(frequency) if isinstance(frequency, list) else config.num_layers // frequency


def deal(
    lengths: Sequence[int],
    ranks: int,
    budget: int,
    cost: Cost,
    multiple: int = 1,
    images: Sequence[float] | None = None,
) -> Deal:
    """Sequences dealt over data-parallel ranks by estimated cost. Deterministic; no sequence is split.

    The heaviest sequence goes first, each to the rank that has least (LPT, Graham 1969: at most 4/3 of the best
    possible). A micro-batch holds at most `budget` tokens; a longer sequence has one of its own. Every rank gets the
    same number of micro-batches, some of them empty if need be, the heaviest first: ranks that share experts meet in
    every layer of every micro-batch.

    Args:
        multiple: what the number of micro-batches must be a multiple of (interleaved pipelines).
        images: what each sequence costs besides its tokens, FLOPs; None: nothing.
    """
    besides = images or [0.0] * len(lengths)
    costs = [cost(length) + more for length, more in zip(lengths, besides, strict=True)]
    heaviest_first = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in heaviest_first:
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += costs[i]
    fits = [_first_fit(share, lengths, budget) for share in shares]
    rounds = max(1, *(len(fit) for fit in fits))
    rounds += -rounds % multiple
    dealt = [
        _balanced(share, lengths, costs, budget, rounds) or fit + [[] for _ in range(rounds - len(fit))]
        for share, fit in zip(shares, fits, strict=True)
    ]
    for micro_batches in dealt:
        micro_batches.sort(key=lambda micro_batch: -sum(costs[i] for i in micro_batch))
    return Deal([[sorted(m) for m in micro_batches] for micro_batches in dealt], loads)


def _first_fit(heaviest_first: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As few micro-batches as first fit makes."""
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for i in heaviest_first:
        which = next((k for k, free in enumerate(room) if free >= lengths[i]), len(room))
        if which == len(room):
            micro_batches.append([])
            room.append(budget)
        micro_batches[which].append(i)
        room[which] -= lengths[i]
    return micro_batches


def _balanced(
    heaviest_first: Sequence[int], lengths: Sequence[int], costs: Sequence[float], budget: int, rounds: int
) -> list[list[int]] | None:
    """Exactly `rounds` micro-batches of like cost; None where that leaves a sequence without room."""
    micro_batches: list[list[int]] = [[] for _ in range(rounds)]
    room, loads = [budget] * rounds, [0.0] * rounds
    for i in heaviest_first:
        open_ = [k for k in range(rounds) if room[k] >= lengths[i] or not micro_batches[k]]
        if not open_:
            return None
        which = min(open_, key=loads.__getitem__)
        micro_batches[which].append(i)
        room[which] -= lengths[i]
        loads[which] += costs[i]
    return micro_batches
