"""The policy while the engine samples: no memory on the device, and every value there again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.offload import park, unpark
from dapo_mcore.config import Dtype, OptimConfig
from tests.unit.actor.test_reference import BATCH, reference_of

MakeActor = Callable[..., Actor]
PARTS = ("param_offload", "grad_offload", "optimizer_offload")


def size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def take_a_turn(actor: Actor) -> None:
    with actor.on_host():
        pass


def parts(actor: Actor) -> dict[str, list[Tensor]]:
    """Tensors by the option that offloads them; in fp32 main parameters are parameters."""
    weights = [p for chunk in actor.chunks for p in chunk.parameters()]
    pointers = {p.untyped_storage().data_ptr() for p in weights}
    main = [p for group in actor._optimizer.param_groups for p in group["params"]]
    moments = [v for _, state in actor._optimizer.state.items() for v in state.values() if torch.is_tensor(v)]
    return {
        "param_offload": weights,
        "grad_offload": [p.main_grad for p in weights],
        "optimizer_offload": [t for t in main + moments if t.untyped_storage().data_ptr() not in pointers],
    }


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
@pytest.mark.parametrize("option", PARTS)
def test_an_option_frees_its_part_and_no_other(option: str, dtype: Dtype, make_actor: MakeActor) -> None:
    actor = make_actor("qwen3_tied", dtype=dtype, megatron={option: True})
    actor.update(BATCH)
    held = parts(actor)
    assert all(held.values())
    with actor.on_host():
        assert {name for name, tensors in held.items() if not any(map(size, tensors))} == {option}
        assert all(all(map(size, tensors)) for name, tensors in held.items() if name != option)
    assert all(map(size, held["param_offload"]))
    actor.update(BATCH)
    assert all(size(tensor) > 0 for tensors in held.values() for tensor in tensors)


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_resting_policy_has_its_weights_and_nothing_else(dtype: Dtype, make_actor: MakeActor) -> None:
    actor = make_actor("qwen3_tied", dtype=dtype, megatron=dict.fromkeys(PARTS, True))
    actor.update(BATCH)
    held = parts(actor)
    expected = actor.logprobs(BATCH)
    actor.rest()
    for _ in range(2):
        assert not any(size(tensor) for name in ("grad_offload", "optimizer_offload") for tensor in held[name])
        assert torch.equal(actor.logprobs(BATCH), expected)
        take_a_turn(actor)


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_the_state_of_a_resting_policy_is_that_of_one_awake(dtype: Dtype, make_actor: MakeActor) -> None:
    actor = make_actor("qwen3", dtype=dtype, megatron=dict.fromkeys(PARTS, True))
    actor.update(BATCH)
    held = parts(actor)["optimizer_offload"]
    before = [tensor.clone() for tensor in held]
    actor.rest()
    actor.state()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(held, before, strict=True))


@pytest.mark.parametrize("distributed", [True, False])
def test_a_bf16_policy_that_was_away_trains_on_as_if_it_had_stayed(distributed: bool, make_actor: MakeActor) -> None:
    def trained(**offload: Any) -> tuple[list[Any], list[Tensor]]:
        layout = {"use_distributed_optimizer": distributed, **offload}
        actor = make_actor("qwen3", dtype=Dtype.bf16, megatron=layout, optim=OptimConfig(lr=1e-2))
        seen = []
        for _ in range(3):
            take_a_turn(actor)
            seen.append((actor.logprobs(BATCH), actor.update(BATCH)))
        states = [tensor.clone() for tensors in parts(actor).values() for tensor in tensors]
        return seen, [weight.clone() for _, weight in actor.weights()] + states

    (stayed, expected), (away, found) = trained(), trained(**dict.fromkeys(PARTS, True))
    for (one, first), (other, second) in zip(stayed, away, strict=True):
        assert torch.equal(one, other)
        assert first == second
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_the_policy_is_back_when_sampling_failed(make_actor: MakeActor) -> None:
    actor = make_actor("llama", megatron=dict.fromkeys(PARTS, True))
    before = actor.logprobs(BATCH)
    with pytest.raises(RuntimeError, match="sampling"), actor.on_host():
        raise RuntimeError("sampling failed")
    assert torch.equal(actor.logprobs(BATCH), before)


def test_views_of_a_parked_storage_see_its_values_again() -> None:
    whole = torch.arange(12.0)
    expected, row, tail = whole.clone(), whole.view(3, 4)[1], whole[10:]
    parked = park([row, tail])
    assert size(whole) == size(row) == 0
    assert len(parked) == 1
    unpark(parked)
    assert torch.equal(whole, expected)
    row += 1
    assert torch.equal(whole[4:8], expected[4:8] + 1)


def test_dropped_tensors_take_no_host_memory_even_when_they_are_also_kept() -> None:
    whole = torch.ones(8)
    (parked,) = park([whole[:4]], dropped=[whole[4:]])
    assert parked.values is None
    unpark([parked])
    assert whole.fill_(2.0).sum() == 16


def test_a_resting_reference_has_no_memory_on_the_device(make_actor: MakeActor, tmp_path: Path) -> None:
    make_actor("llama")
    reference = reference_of(tmp_path, "llama", param_offload=True)
    weights = [p for chunk in reference._chunks for p in chunk.parameters()]
    assert not any(map(size, weights))
    first = reference.score(BATCH, responses_per_update=6).ref_logprobs
    assert not any(map(size, weights))
    assert torch.equal(reference.score(BATCH, responses_per_update=6).ref_logprobs, first)
