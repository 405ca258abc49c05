"""How often the vision tower computes an image, and who shares what it has seen."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.actor.reference import Reference, build_reference
from dapo_mcore.actor.vision.features import shared_out
from dapo_mcore.config import (
    ActorConfig,
    Dtype,
    MegatronConfig,
    ModelConfig,
    OldLogprobs,
    OptimConfig,
    Recompute,
    RefConfig,
    TowerTraining,
    VisionConfig,
)
from dapo_mcore.types import TrainBatch
from tests.tiny_vl import save_published, tiny_vl
from tests.vision_packs import mixed_batch

DISTINCT = 4  # images in the mixed batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = save_published(tiny_vl("qwen3_vl"), tmp_path_factory.mktemp("published"))
    return ModelConfig(path=str(folder), dtype=Dtype.fp32)


def options(train: TowerTraining) -> ActorConfig:
    return ActorConfig(
        megatron=MegatronConfig(use_distributed_optimizer=False),
        ppo_max_token_len_per_gpu=70,
        old_logprobs=OldLogprobs.recompute,
        optim=OptimConfig(lr=1e-2),
        vision=VisionConfig(train=train),
    )


def build(model: ModelConfig, train: TowerTraining) -> tuple[Actor, Reference]:
    policy = build_actor(model, options(train), total_steps=1)
    return policy, build_reference(model, options(train), RefConfig(), policy.chunks)


def tower(parts: Any) -> Any:
    return parts.chunks[0].features.tower if isinstance(parts, Actor) else parts._chunks[0].features.tower


@contextmanager
def images_seen(module: torch.nn.Module) -> Iterator[list[int]]:
    """Images of each call while the block runs."""
    seen: list[int] = []
    hook = module.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["grid_thw"])), with_kwargs=True)
    yield seen
    hook.remove()


def train(policy: Actor, reference: Reference, batch: TrainBatch) -> None:
    """A step of three updates."""
    for part in policy.score(reference.score(batch, 2), 2).split(2):
        policy.update(part)


def test_a_frozen_tower_sees_each_image_of_a_step_once_for_scores_updates_and_the_reference(model: ModelConfig) -> None:
    policy, reference = build(model, TowerTraining.frozen)
    assert tower(reference) is tower(policy)
    batch = mixed_batch()
    with images_seen(tower(policy)) as seen:
        train(policy, reference, batch)
        assert sum(seen) == DISTINCT
        train(policy, reference, mixed_batch())
        assert sum(seen) == 2 * DISTINCT


def test_features_go_with_the_batch_and_at_the_end_of_a_step(model: ModelConfig) -> None:
    policy, _ = build(model, TowerTraining.frozen)
    known: Any = policy.chunks[0].features
    batch = mixed_batch()
    policy.logprobs(batch)
    assert len(known._seen) == DISTINCT
    policy.finish_step()
    assert len(known._seen) == 0
    policy.logprobs(batch)
    assert len(known._seen) == DISTINCT
    del batch
    gc.collect()
    assert len(known._seen) == 0


def test_features_go_when_a_checkpoint_is_loaded(model: ModelConfig) -> None:
    policy, _ = build(model, TowerTraining.frozen)
    (chunk,), batch = policy.chunks, mixed_batch()
    before = policy.logprobs(batch)
    changed = {
        name: value * 1.1 if name.startswith("visual.merger.") else value for name, value in chunk.state_dict().items()
    }
    chunk.load_state_dict(changed)
    assert (policy.logprobs(batch) - before).abs().max() > 1e-4


def test_a_trained_tower_sees_each_distinct_image_of_a_micro_batch_once(model: ModelConfig) -> None:
    policy, _ = build(model, TowerTraining.all)
    batch = mixed_batch().select([1, 4, 1, 0])  # one micro-batch would be 104 tokens
    shares = policy._scorer.deal(batch).shares[0]
    with images_seen(tower(policy)) as seen:
        policy.update(batch)
    assert len(shares) == 2
    assert seen == [1, 1]


@pytest.mark.parametrize(("recompute", "passes"), [(Recompute.none, 1), (Recompute.full, 2)])
def test_full_recomputation_runs_each_block_of_a_trained_tower_once_more(
    model: ModelConfig, recompute: Recompute, passes: int
) -> None:
    megatron = replace(options(TowerTraining.all).megatron, recompute=recompute)
    policy = build_actor(model, replace(options(TowerTraining.all), megatron=megatron), total_steps=1)
    called: list[int] = []
    for number, block in enumerate(tower(policy).blocks):
        block.attn.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    policy.update(mixed_batch().select([1]))
    assert sorted(called) == sorted([*range(len(tower(policy).blocks))] * passes)


@pytest.mark.parametrize("trained", [TowerTraining.mergers, TowerTraining.all])
def test_the_reference_keeps_a_tower_of_its_own_beside_a_trained_one(
    model: ModelConfig, trained: TowerTraining
) -> None:
    policy, reference = build(model, trained)
    batch = mixed_batch()
    before = reference.score(batch, 5).ref_logprobs
    with images_seen(tower(reference)) as seen:
        train(policy, reference, batch)
    assert seen == []  # it had seen them
    assert torch.equal(reference.score(batch, 5).ref_logprobs, before)


def test_the_reference_keeps_its_tower_where_the_policy_continues_with_another(model: ModelConfig) -> None:
    policy = build_actor(model, options(TowerTraining.frozen), total_steps=1)
    tower(policy).merger.norm.weight.data += 1e-3
    reference = build_reference(model, options(TowerTraining.frozen), RefConfig(), policy.chunks)
    assert tower(reference) is not tower(policy)


@pytest.mark.parametrize(
    ("trained", "moves"),
    [
        (TowerTraining.frozen, set()),
        (TowerTraining.mergers, {"merger", "deepstack_merger_list"}),
        (TowerTraining.all, {"merger", "deepstack_merger_list", "blocks", "pos_embed", "patch_embed"}),
    ],
)
def test_an_update_moves_what_is_trained_and_nothing_else(
    model: ModelConfig, trained: TowerTraining, moves: set[str]
) -> None:
    policy, _ = build(model, trained)
    before = {name: p.clone() for name, p in tower(policy).named_parameters()}
    policy.update(mixed_batch())
    moved = {name for name, p in tower(policy).named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == moves


def test_without_an_image_a_trained_tower_has_gradients_of_0_and_all_of_them(model: ModelConfig) -> None:
    policy, _ = build(model, TowerTraining.all)
    called: set[str] = set()
    for name, parameter in tower(policy).named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.add(name))
    text = mixed_batch().select([0])
    policy.update(replace(text, visuals=None))
    assert called == {name for name, _ in tower(policy).named_parameters()}
    assert all(p.main_grad.eq(0).all() for p in tower(policy).parameters())


def test_norms_and_biases_of_a_trained_tower_do_not_decay(model: ModelConfig) -> None:
    policy, _ = build(model, TowerTraining.all)
    decays = {id(p): g["wd_mult"] for g in policy._optimizer.param_groups for p in g["params"]}
    found = {name for name, p in tower(policy).named_parameters() if decays[id(p)] == 0.0}
    assert found == {n for n, _ in tower(policy).named_parameters() if n.endswith(".bias") or ".norm" in n}


@pytest.mark.parametrize(
    ("tokens", "ranks", "shares"),
    [
        ([], 2, [[], []]),
        ([4], 2, [[0], []]),
        ([1, 6, 2, 3], 2, [[1], [0, 2, 3]]),
        ([5, 5, 5], 2, [[0, 2], [1]]),
    ],
)
def test_images_are_shared_out_by_their_tokens(tokens: list[int], ranks: int, shares: list[list[int]]) -> None:
    assert shared_out(tokens, ranks) == shares
