"""What a run takes of every device's memory and of its hosts', calculated before anything is built.

Counted is what follows from the options and the sizes of the model, with tokens spread evenly over experts; not the
programs themselves, buffers of collectives, captured graphs, fragments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dapo_kernels.chunks import ACCELERATOR_CHUNK_BYTES

from dapo_mcore.config import Dtype, MegatronConfig, Recompute, RolloutBackend, RunConfig, TowerTraining
from dapo_mcore.weights.families import TextDims, language_config, moe_dims, text_dims
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.tower import tower_dims

ITEM_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
GRADIENT_BYTES = 4  # gradients are summed in fp32, whatever the weights are
ADAM_BYTES = {Dtype.bf16: 12, Dtype.fp32: 8}  # two moments in fp32, and beside bf16 the main parameters
TURNS = ("train", "push", "sample", "host")  # the columns of a part


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes on one device in each turn of a step, and in host memory while the engine samples."""

    name: str
    train: int = 0
    push: int = 0
    sample: int = 0
    host: int = 0


@dataclass(frozen=True, slots=True)
class Elements:
    """Numbers that a device trains or samples with."""

    dense: int
    experts: int
    tower: int
    mergers: int  # of the tower


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of the fullest device; `kv_tokens` fit into the KV cache of an engine."""

    parts: tuple[Part, ...]
    kv_tokens: int

    @property
    def total(self) -> Part:
        return Part("in all", *(sum(getattr(part, turn) for part in self.parts) for turn in TURNS))


def footprint(config: RunConfig, hf_config: Any, world_size: int) -> Footprint:
    """For a model with these sizes on `world_size` devices; `hf_config` is its config.json as an object.

    Raises:
        ValueError: the model's family is not declared, or the layout does not fit it.
    """
    train = TrainLayout.of(config.actor.megatron, world_size)
    rollout = RolloutLayout.of(config.rollout, config.rollout.tensor_model_parallel_size)
    each = world_size // train.pp
    stages = [_stage(config, hf_config, train, stage * each) for stage in range(train.pp)]
    fullest = max(stages, key=lambda parts: sum(part.train for part in parts))
    sampling, kv_tokens = _sampling(config, hf_config, rollout)
    return Footprint((*fullest, *sampling), kv_tokens)


def elements(hf_config: Any, layout: TrainLayout | RolloutLayout, rank: int, padded_vocab: int) -> Elements:
    """What `rank` holds, padding of the vocabulary included."""
    trains = isinstance(layout, TrainLayout)
    layers = language_config(hf_config).num_hidden_layers
    dense = experts = tower = mergers = 0
    for row in parameters(hf_config, padded_vocab):
        # A tied head is a second tensor on the last of several stages only.
        if rank not in layout.ranks_of(row, layers) or (row.row.twin and not (trains and layout.pp > 1)):
            continue
        parts = layout.parts(row)
        cut = row.layout.mcore if trains else row.layout.vllm
        size = math.prod(cut(rank % parts, parts).shape)
        if row.experts:
            experts += size * len(layout.experts(rank, row.experts))
        elif row.section.dims is tower_dims:
            tower += size
            mergers += size if "merger" in row.section.hf else 0
        else:
            dense += size
    return Elements(dense, experts, tower, mergers)


def _stage(config: RunConfig, hf_config: Any, train: TrainLayout, rank: int) -> list[Part]:
    """What the policy takes on `rank`."""
    megatron, dtype, item = config.actor.megatron, config.model.dtype, ITEM_BYTES[config.model.dtype]
    rows = language_config(hf_config).vocab_size
    held = elements(hf_config, train, rank, rows + -rows % train.tp)
    of_tower = {TowerTraining.frozen: 0, TowerTraining.mergers: held.mergers, TowerTraining.all: held.tower}
    dense = held.dense + of_tower[config.actor.vision.train]
    shards = train.ranks // (train.tp * train.pp), train.ranks // (train.ep * train.etp * train.pp)
    if not megatron.use_distributed_optimizer:
        shards = 1, 1
    weights, tower = item * (held.dense + held.experts), item * held.tower
    gradients = GRADIENT_BYTES * (dense + held.experts)
    optimizer = ADAM_BYTES[dtype] * (-(-dense // shards[0]) + -(-held.experts // shards[1]))
    colocated = config.rollout.backend is RolloutBackend.colocated

    def resting(name: str, size: int, offloaded: bool, pushed: bool = True, kept: bool = True) -> Part:
        stays = size if colocated and not offloaded else 0
        rests = offloaded and colocated and not pushed
        return Part(name, size, 0 if rests else size, stays, size if offloaded and kept else 0)

    parts = [
        resting("weights", weights, megatron.param_offload),
        resting("vision tower", tower, megatron.param_offload),
        resting("gradients", gradients, megatron.grad_offload, pushed=False, kept=False),
        resting("optimizer", optimizer, megatron.optimizer_offload, pushed=False),
        *_activations(config, hf_config, train, rank),
    ]
    if config.needs_reference:
        parts.append(resting("reference", weights + tower, config.ref.param_offload))
    return parts


def _activations(config: RunConfig, hf_config: Any, train: TrainLayout, rank: int) -> Iterator[Part]:
    """Of the micro-batches that are on their way through the pipeline."""
    megatron, item = config.actor.megatron, ITEM_BYTES[config.model.dtype]
    dims = moe_dims(hf_config, None) if hf_config.model_type.endswith("_moe") else text_dims(hf_config, None)
    longest = config.data.max_prompt_length + config.data.max_response_length
    tokens = max(config.actor.ppo_max_token_len_per_gpu, -(-longest // train.cp))
    sequence = train.tp if megatron.sequence_parallel else 1
    stage = rank // (train.ranks // train.pp)
    layers, under_way = dims.layers // train.pp, _under_way(train, stage)
    kept = dims.hidden / sequence
    inside = _inside_a_layer(dims, megatron, getattr(language_config(hf_config), "num_experts_per_tok", 0))
    if megatron.recompute is Recompute.full:
        numbers = kept * layers * under_way + inside  # the inputs of all layers, and one layer computed again
    else:
        numbers = inside * layers * under_way
    if stage == 0 and hasattr(hf_config, "vision_config"):
        numbers += kept * (1 + len(hf_config.vision_config.deepstack_visual_indexes)) * under_way
    yield Part("activations", train=int(item * tokens * numbers))
    if stage == train.pp - 1:
        buffers = 2 if train.tp > 1 else 1
        chunk = min(ACCELERATOR_CHUNK_BYTES, 4 * tokens * dims.vocab // train.tp)
        yield Part("logits", train=buffers * chunk)


def _under_way(train: TrainLayout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, 1F1B; interleaved counts its chunks as shares of one."""
    if train.vpp == 1:
        return train.pp - stage
    chunks = 2 * (train.pp - stage - 1) + (train.vpp - 1) * train.pp + 1
    return min(chunks, train.pp * train.vpp + train.pp) / train.vpp


def _inside_a_layer(dims: TextDims, megatron: MegatronConfig, chosen: int) -> float:
    """Numbers per token that the backward pass of a layer reads, with attention that does not keep its scores: inputs
    of norms and what comes out of them, queries, keys, values before and after the rotary embedding, attention's
    result, and of the MLP what goes in, gate, up and their product."""
    tp, etp = megatron.tensor_model_parallel_size, megatron.expert_tensor_parallel_size
    sequence = tp if megatron.sequence_parallel else 1
    around = 4 * dims.hidden / sequence
    attention = (3 * dims.heads + 4 * dims.groups) * dims.head_dim / tp
    mlp = 3 * dims.ffn / tp
    if dims.sparse_layers:
        mlp = max(mlp if len(dims.sparse_layers) < dims.layers else 0,
                  chosen * (2 * dims.hidden + 3 * dims.expert_ffn / etp) * etp / sequence)  # fmt: skip
    return around + attention + mlp


def _sampling(config: RunConfig, hf_config: Any, rollout: RolloutLayout) -> tuple[list[Part], int]:
    """What an engine takes on the fullest of its devices, and the tokens that its KV cache holds."""
    item, dims = ITEM_BYTES[config.model.dtype], text_dims(hf_config, None)
    held = elements(hf_config, rollout, 0, dims.vocab)  # the first has the most experts
    colocated = config.rollout.backend is RolloutBackend.colocated
    weights, tower = item * (held.dense + held.experts), item * held.tower
    cache = config.rollout.kv_cache_mb << 20
    bucket = min(config.weights.bucket_mb << 20, 2 * (weights + tower))  # half to send, half to receive
    per_token = 2 * dims.layers * max(1, dims.groups // rollout.tp) * dims.head_dim * item
    parts = [
        Part("engine's weights", push=weights if colocated else 0, sample=weights),
        Part("engine's vision tower", push=tower if colocated else 0, sample=tower),
        Part("KV cache", sample=cache),
        Part("bucket of a push", push=bucket if colocated else 0),
    ]
    return parts, cache // per_token


def table(found: Footprint, world_size: int, per_node: int) -> list[str]:
    """Lines to print: decimal GB, or MB for a small model."""
    unit, one = ("GB", 1e9) if max(getattr(found.total, turn) for turn in TURNS[:3]) >= 1e9 else ("MB", 1e6)
    devices = min(world_size, per_node)
    head = f"{f'memory in {unit}, calculated':<25}" + "".join(f"{title:>9}" for title in (*TURNS[:3], "host"))
    shown = [part for part in found.parts if any(getattr(part, turn) for turn in TURNS)]
    rows = [_row(part, one, devices) for part in (*shown, found.total)]
    return [head, *rows, f"(of one device, and of the host of {devices}; {found.kv_tokens:,} tokens of KV cache)"]


def _row(part: Part, one: float, devices: int) -> str:
    sizes: Sequence[int] = (part.train, part.push, part.sample, part.host * devices)
    return f"{part.name:<25}" + "".join(f"{size / one:>9.1f}" if size else f"{'':>9}" for size in sizes)
