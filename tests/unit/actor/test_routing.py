"""What routers are told of a micro-batch, the losses on their logits, and when a replay counts as failed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dapo_mcore.actor.packing import Cut, Origin, pack
from dapo_mcore.actor.router_losses import balance_terms, with_loss
from dapo_mcore.actor.routing import RouterReplayError, refuse_native_choices, routing_metrics
from dapo_mcore.config import MoeConfig
from dapo_mcore.types import TrainBatch

CPU = torch.device("cpu")
LAYERS, TOP_K = 2, 2
# three responses of 3, 2 and 4 tokens with their prompts; a token's route in layer l is [token, token + 10 * l]
TOKENS = torch.tensor([1, 2, 3, 11, 12, 21, 22, 23, 24])
BATCH = TrainBatch(
    token_ids=TOKENS,
    prompt_lengths=torch.tensor([1, 1, 2]),
    response_lengths=torch.tensor([2, 1, 2]),
    loss_mask=torch.ones(5, dtype=torch.bool),
    advantages=torch.zeros(5),
    rollout_logprobs=torch.zeros(5),
    routes=torch.stack([torch.stack([TOKENS, TOKENS + 10 * layer], -1) for layer in range(LAYERS)], 1).to(torch.uint8),
)


def origin(sequences: list[int], cut: Cut | None = None, batch: TrainBatch = BATCH) -> Origin:
    return pack(batch, sequences, batch.loss_mask, cut or Cut(), CPU).origin


def test_every_token_of_a_micro_batch_brings_its_response_and_its_route() -> None:
    found = origin([2, 0])
    assert found.response.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.lengths.tolist() == [4, 3]
    assert found.routes is not None
    assert found.routes[:, 0, 0].tolist() == [21, 22, 23, 24, 1, 2, 3]
    assert found.routes[:, 1, 1].tolist() == [31, 32, 33, 34, 11, 12, 13]
    assert (found.batch_responses, found.batch_tokens) == (3, 9)


def test_padding_belongs_to_no_response_and_goes_to_different_experts() -> None:
    found = origin([1, 0], Cut(sequence_size=4))
    assert found.response.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert found.routes is not None
    assert found.routes[-1].tolist() == [[0, 1], [0, 1]]
    assert origin([], Cut(sequence_size=2)).response.tolist() == [0, 0]  # no response at all: all is padding


def test_context_parallel_ranks_share_the_tokens_of_each_response() -> None:
    parts = [origin([0, 2], Cut(context_size=2, context_rank=rank)) for rank in range(2)]
    held = sorted(
        token
        for part in parts
        for token, response in zip(part.routes[:, 0, 0].tolist(), part.response.tolist(), strict=True)  # type: ignore[index]
        if response < 2
    )
    assert held == [1, 2, 3, 21, 22, 23, 24]
    assert [part.lengths.tolist() for part in parts] == [[3, 4]] * 2


def test_selected_responses_keep_their_routes() -> None:
    assert BATCH.select([2, 1]).routes[:, 0, 0].tolist() == [21, 22, 23, 24, 11, 12]  # type: ignore[index]
    assert replace(BATCH, routes=None).select([0]).routes is None


def test_the_balance_loss_is_one_when_all_experts_share_alike_and_grows_to_their_number() -> None:
    group, lengths = dist.group.WORLD, torch.tensor([4])
    assert group is not None
    response = torch.zeros(4, dtype=torch.int64)
    even, _ = balance_terms(50 * torch.eye(4), response, lengths, 1, group)
    alone, _ = balance_terms(torch.tensor([50.0, 0, 0, 0]).expand(4, 4), response, lengths, 1, group)
    assert even.item() == pytest.approx(1.0)
    assert alone.item() == pytest.approx(4.0)


def test_the_balance_loss_is_taken_response_by_response() -> None:
    group, lengths = dist.group.WORLD, torch.tensor([2, 2])
    assert group is not None
    logits = 50 * torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # even over the batch, one expert in each response
    total, _ = balance_terms(logits, torch.tensor([0, 0, 1, 1]), lengths, 1, group)
    assert total.item() == pytest.approx(2 * 2.0)


def test_padding_has_no_part_in_the_losses() -> None:
    group = dist.group.WORLD
    assert group is not None
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0], [9.0, 9.0]], requires_grad=True)
    aux, z = balance_terms(logits, torch.tensor([0, 0, 1]), torch.tensor([2]), 1, group)
    assert z.item() == pytest.approx(2.313262**2 + 3.126928**2, rel=1e-5)
    with_loss(logits, aux + z).sum().backward()
    assert logits.grad is not None
    assert logits.grad[2].tolist() == [1.0, 1.0]
    assert not torch.equal(logits.grad[:2], torch.ones(2, 2))


def row(replayed: float, native: float, load: list[float] | None = None) -> dict[str, torch.Tensor]:
    counts = {"replayed": replayed, "native": native, "changed": 1.0, "aux_loss": 2.0, "z_loss": 3.0}
    return {
        "load": torch.tensor(load or [1.0, 1.0], dtype=torch.float64),
        **{name: torch.tensor(value) for name, value in counts.items()},
    }


def test_a_layer_that_replayed_nothing_or_chose_itself_fails_the_run() -> None:
    refuse_native_choices({0: row(5, 0), 3: row(7, 0)})
    with pytest.raises(RouterReplayError, match=r"router_replay=true.*layer 3: 0 replayed, 0 native"):
        refuse_native_choices({0: row(5, 0), 3: row(0, 0)})
    with pytest.raises(RouterReplayError, match="layer 0: 5 replayed, 2 native"):
        refuse_native_choices({0: row(5, 2)})


def test_loads_are_those_of_the_layer_that_is_worst_off() -> None:
    totals = {0: row(4, 0, [2, 2, 2, 2]), 2: row(4, 0, [5, 1, 1, 1])}
    found = {name: ratio.value for name, ratio in routing_metrics(totals, MoeConfig(router_replay=True)).items()}
    assert found == {"moe/load_max_over_mean": 2.5, "moe/load_min_over_mean": 0.5, "moe/replay_changed_fraction": 0.25}
