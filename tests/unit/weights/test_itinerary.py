"""One rank's order of work, from plans small enough to check by hand, and the engine's parameters against the plan."""

from __future__ import annotations

from math import prod

import pytest
from transformers import Qwen3MoeConfig

from dapo_mcore.weights.itinerary import itinerary, mismatches, numbered, targets
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import Plan, reshard_plan

SIZES = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 8, "tie_word_embeddings": True,
}  # fmt: skip
HF = Qwen3MoeConfig(**SIZES)
DECLARED = list(parameters(HF))
BUCKET = 400  # elements, less than most tensors have


def plan(train: dict[str, int], rollout: dict[str, int]) -> Plan:
    return reshard_plan(HF, TrainLayout(ranks=2, **train), RolloutLayout(ranks=2, **rollout))


def engine_shapes(plan: Plan, rank: int) -> dict[str, tuple[int, ...]]:
    return {target.name: target.shape for target in targets(DECLARED, plan.rollout, rank, {}).values()}


LAYOUTS = [
    ({"tp": 2}, {"tp": 2}),
    ({"ep": 2}, {"tp": 2, "ep": 2}),
    ({"pp": 2}, {}),
    ({"tp": 2, "etp": 2}, {"tp": 2, "ep": 2}),
]


@pytest.mark.parametrize(("train", "rollout"), LAYOUTS)
def test_every_piece_is_sent_received_and_taken_over_once_in_bounded_rounds(train, rollout):
    whole = plan(train, rollout)
    pieces, rounds = numbered(whole, BUCKET)
    sent, received, copied = [], [], []
    for rank in range(2):
        found = targets(DECLARED, whole.rollout, rank, {})
        names = [target.name for target in found.values()]
        steps = itinerary(pieces, rounds, rank, DECLARED, found)
        arrived: set[int] = set()
        for step in steps:
            for direction in (step.sends, step.receives):
                assert sum(pieces[n].size for numbers in direction.values() for n in numbers) <= BUCKET
            sent += [n for numbers in step.sends.values() for n in numbers]
            arrived |= {n for numbers in step.receives.values() for n in numbers}
            for layer in step.completes:
                assert arrived >= set(layer.received), "a layer is taken over before its last piece has come"
                received += layer.received
                copied += layer.copies
        assert sorted(name for step in steps for layer in step.completes for name in layer.names) == sorted(names)
    local = rounds[0].start if rounds else len(pieces)
    assert sorted(copied) == list(range(local))
    assert sorted(sent) == sorted(received) == list(range(local, len(pieces)))
    assert sum(piece.size for piece in pieces) == sum(transfer.size for transfer in whole.transfers)


def test_what_two_ranks_exchange_in_a_round_lies_in_the_same_order_on_both():
    whole = plan({"pp": 2}, {})
    pieces, rounds = numbered(whole, BUCKET)
    first, second = (
        itinerary(pieces, rounds, rank, DECLARED, targets(DECLARED, whole.rollout, rank, {})) for rank in range(2)
    )
    assert len(rounds) > 1
    for here, there in zip(first, second, strict=True):
        assert here.sends.get(1, []) == there.receives.get(0, [])
        assert there.sends.get(0, []) == here.receives.get(1, [])


def test_an_engine_is_filled_exactly_or_the_difference_is_named():
    whole = plan({"ep": 2}, {"tp": 2, "ep": 2})
    pieces, _ = numbered(whole, BUCKET)
    shapes = engine_shapes(whole, 1)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (48, 32)
    assert shapes["model.layers.1.mlp.experts.w13_weight"] == (2, 16, 32)
    found = targets(DECLARED, whole.rollout, 1, shapes)
    assert mismatches(found, pieces, 1, shapes) == []
    assert sum(t.size for t in found.values()) < sum(map(prod, shapes.values())), "padding is not written"

    shapes["model.extra.weight"] = (3,)
    shapes["model.norm.weight"] = (64,)
    del shapes["model.layers.0.mlp.gate.weight"]
    skipped = [piece for piece in pieces if DECLARED[piece.parameter].vllm_forms[0].names[0] != W2]
    assert mismatches(found, skipped, 1, shapes) == [
        "model.extra.weight of the engine is not in the family's table",
        "model.layers.0.mlp.gate.weight: the engine has None, the layout says [4, 32]",
        f"{W2}: the plan writes 0 of 512 elements",
        "model.norm.weight: the engine has [64], the layout says [32]",
    ]


W2 = "model.layers.1.mlp.experts.w2_weight"
