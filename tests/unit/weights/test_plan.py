"""The plan against a simulation of what Megatron and vLLM hold, element by element."""

from collections import Counter
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_mcore.weights.families import FAMILIES
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.placement import RolloutLayout, TrainLayout
from dapo_mcore.weights.plan import reshard_plan
from tests.unit.weights.element_ids import UNWRITTEN, after, before, config, language, numbered

DIVISORS = {1: [1], 2: [1, 2], 4: [1, 2, 4], 8: [1, 2, 4, 8]}


@st.composite
def cases(draw):
    """A model, both layouts, the ranks of a node and the elements of a bucket."""
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    pp = draw(st.sampled_from(DIVISORS[min(ranks, 4)]))
    vpp = draw(st.sampled_from(DIVISORS[4 // pp]))
    tp = draw(st.sampled_from(DIVISORS[ranks // pp]))
    cp = draw(st.sampled_from(DIVISORS[ranks // pp // tp]))
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    is_moe = model_type.endswith("_moe")
    ep = draw(st.sampled_from(DIVISORS[ranks // pp])) if is_moe else 1
    etp = draw(st.sampled_from(DIVISORS[ranks // pp // ep])) if is_moe else 1
    rollout_tp = draw(st.sampled_from(DIVISORS[ranks]))
    rollout_ep = draw(st.sampled_from([1, *(e for e in DIVISORS[ranks] if e % rollout_tp == 0)])) if is_moe else 1
    hf = config(
        model_type,
        num_key_value_heads=draw(st.sampled_from([1, 2, 4, 8])),
        tie_word_embeddings=draw(st.booleans()),
        vocab_size=draw(st.integers(1, 130)),
        num_experts=draw(st.sampled_from([8, 16])),
    )
    train = dict(ranks=ranks, tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp)
    rollout = dict(ranks=ranks, tp=rollout_tp, ep=rollout_ep)
    return hf, train, rollout, draw(st.sampled_from([2, 8])), draw(st.sampled_from([1, 7, 64, 1000]))


def plan_of(hf, train, rollout, node=8):
    rows = language(hf).vocab_size
    padded = rows + -rows % train.get("tp", 1)
    return reshard_plan(hf, TrainLayout(**train), RolloutLayout(**rollout), padded, node)


def places(transfer):
    """The rectangle on both sides, as slices."""
    (rows, columns), (from_row, from_column), (to_row, to_column) = (
        transfer.shape, transfer.mcore_at, transfer.vllm_at
    )  # fmt: skip
    there = (slice(from_row, from_row + rows), slice(from_column, from_column + columns))
    return there, (slice(to_row, to_row + rows), slice(to_column, to_column + columns))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_element_is_written_once_from_a_rank_that_holds_it_and_no_padding_is_sent(case):
    hf, train, rollout, node, bucket = case
    rows = list(parameters(hf))
    tensors = numbered(rows)
    held, wanted = before(rows, tensors, hf, **train), after(rows, tensors, hf, **rollout)
    plan = plan_of(hf, train, rollout, node)
    written = [{key: np.full_like(matrix, UNWRITTEN) for key, matrix in mine.items()} for mine in wanted]
    local = (t for rank in range(plan.train.ranks) for t in plan.copies(rank))
    for t in chain(local, *plan.rounds(bucket)):
        there, here = places(t)
        sent = held[t.source][t.parameter, t.expert][there]
        assert sent.shape == t.shape, "outside of what the source holds"
        assert (sent >= 0).all(), "padding"
        target = written[t.destination][t.parameter, t.expert][here]
        assert (target == UNWRITTEN).all(), "written twice"
        target[:] = sent
    for rank, mine in enumerate(wanted):
        for key, matrix in mine.items():
            np.testing.assert_array_equal(written[rank][key], matrix)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_nearest_holder_sends(case):
    hf, train, rollout, node, _ = case
    rows = list(parameters(hf))
    held = before(rows, numbered(rows), hf, **train)
    plan = plan_of(hf, train, rollout, node)
    for t in (t for rank in range(plan.train.ranks) for t in plan.sends(rank)):
        key, (there, _) = (t.parameter, t.expert), places(t)
        sent = held[t.source][key][there]
        holding = [rank for rank, mine in enumerate(held) if key in mine and np.isin(sent, mine[key]).all()]
        assert t.destination not in holding
        near = [rank for rank in holding if rank // node == t.destination // node]
        assert t.source in (near or holding)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_nothing_is_sent_in_two_pieces_that_could_go_in_one(case):
    hf, train, rollout, _, bucket = case
    plan = plan_of(hf, train, rollout)
    pieces = {}
    for t in plan.transfers:
        pieces.setdefault((t.source, t.destination, t.parameter, t.expert), []).append(t)
    for several in pieces.values():
        for a, b in combinations(several, 2):
            step = {(b.mcore_at[i] - a.mcore_at[i], b.vllm_at[i] - a.vllm_at[i]) for i in (0, 1)}
            below = step == {(a.shape[0], a.shape[0]), (0, 0)} and a.shape[1] == b.shape[1]
            beside = step == {(a.shape[1], a.shape[1]), (0, 0)} and a.shape[0] == b.shape[0]
            assert not below
            assert not beside
    rounds = plan.rounds(bucket)
    for transfers, following in pairwise(rounds):
        sent, received = loads(transfers)
        first = following[0]
        assert max(sent[first.source], received[first.destination]) + first.size > bucket, "the round had room"
    for transfers in rounds:
        assert max(max(load.values()) for load in loads(transfers)) <= bucket
    pairs = {(t.source, t.destination) for t in plan.transfers if t.source != t.destination}
    everything = plan.rounds(sum(t.size for t in plan.transfers) + 1)
    assert len(everything) == bool(pairs)


def loads(transfers):
    """Elements sent and received, by rank."""
    sent, received = Counter(), Counter()
    for t in transfers:
        sent[t.source] += t.size
        received[t.destination] += t.size
    return sent, received


@settings(deadline=None, max_examples=20)
@given(cases())
def test_the_same_arguments_give_the_same_plan_layer_by_layer(case):
    hf, train, rollout, node, _ = case
    plan, again = plan_of(hf, train, rollout, node), plan_of(hf, train, rollout, node)
    assert plan.transfers == again.transfers
    assert plan.digest == again.digest
    order = [(t.parameter, t.expert, t.destination, t.vllm_at) for t in plan.transfers]
    assert order == sorted(order)


def test_the_digest_tells_plans_apart():
    hf = config("qwen3_moe")
    layouts = [dict(ranks=4, tp=tp, ep=ep) for tp in (1, 2) for ep in (1, 4)]
    digests = [plan_of(hf, train, dict(ranks=4, tp=4, ep=4)).digest for train in layouts]
    wider = plan_of(config("qwen3_moe", hidden_size=4), layouts[0], dict(ranks=4, tp=4, ep=4)).digest
    assert len({*digests, wider}) == 5


def test_senders_that_hold_the_same_share_the_work():
    """Two stages of four: what the second four train, the first four ask the second four for, and the reverse."""
    plan = plan_of(config("llama"), dict(ranks=8, pp=2), dict(ranks=8))
    sent, received = loads(t for t in plan.transfers if t.source != t.destination)
    largest = max(t.size for t in plan.transfers)
    for stage in (range(4), range(4, 8)):
        assert max(sent[r] for r in stage) - min(sent[r] for r in stage) <= largest
    assert len(received) == 8


@pytest.mark.parametrize("rollout", [dict(tp=8), dict(tp=4, ep=4), dict()])
def test_all_ranks_send_and_receive_in_every_round_though_experts_lie_in_order(rollout):
    hf = config("qwen3_moe", num_experts=64)
    plan = plan_of(hf, dict(ranks=8, ep=8), dict(ranks=8, **rollout))
    busiest = max(max(load.values()) for load in loads(t for t in plan.transfers if t.source != t.destination))
    rounds = plan.rounds(busiest // 10)
    assert len(rounds) >= 10
    assert sum(max(max(load.values()) for load in loads(transfers)) for transfers in rounds) < 1.2 * busiest


@pytest.mark.parametrize(
    ("sizes", "train", "rollout", "told"),
    [
        ({}, dict(pp=8), {}, r"train pp=8 x vpp=1: do not divide the model's 4 layers"),
        ({"num_experts": 12}, dict(ep=8), {}, r"train ep=8: the model has 12 experts; use a divisor"),
        ({"num_experts": 4}, {}, dict(ep=8), r"rollout ep=8: the model has 4 experts; use at most"),
        ({"vocab_size": 71}, dict(tp=2), {}, None),
        ({"intermediate_size": 12}, dict(tp=8), {}, r"train tp=8: .*gate_proj.*equal parts.* divides 12"),
        ({"moe_intermediate_size": 12}, dict(etp=8), {}, r"train etp=8: .*experts.*gate_proj.*equal parts"),
        ({"num_key_value_heads": 3, "num_attention_heads": 24}, {}, dict(tp=8),
         r"rollout tp=8: .*q_proj.*24 query heads and 3 key-value heads over 8 ranks; choose"),
    ],
)  # fmt: skip
def test_a_model_that_a_layout_cannot_cut_is_refused_with_option_and_way_out(sizes, train, rollout, told):
    arguments = config("qwen3_moe", **sizes), {"ranks": 8, **train}, {"ranks": 8, **rollout}
    if told is None:
        assert plan_of(*arguments).transfers
        return
    with pytest.raises(ValueError, match=told):
        plan_of(*arguments)


def test_a_dense_model_has_no_experts_to_spread():
    for train, rollout, side in ((dict(ep=2), {}, "train"), ({}, dict(ep=2), "rollout")):
        with pytest.raises(ValueError, match=rf"{side} ep=2: the model has 0 experts; use ep=1"):
            plan_of(config("qwen3"), {"ranks": 2, **train}, {"ranks": 2, **rollout})
