"""Rank 0 may take its time and tells the others what they need: what it decides for all, not all that it knows."""

from dataclasses import replace

from dapo_mcore.config import Loop
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.rollout.collected import Collected
from dapo_mcore.train import LOST_PEER
from dapo_mcore.types import Group, Prompt
from tests.distributed.leader_ranks import collected_by_every_loop, wait_longer_than_the_world_does
from tools.certificate.spawn import spawn


def test_a_decision_may_take_longer_than_collectives_may() -> None:
    first, second = spawn(wait_longer_than_the_world_does, 2)
    assert first[0] == second[0] == "decided"
    assert LOST_PEER.search(second[1]), "a collective that waited in vain is a consequence, not a cause"


def test_what_was_only_sampled_stays_on_rank_0() -> None:
    trained, dropped = (Group(Prompt(uid, uid, (1,), "", ""), ()) for uid in range(2))
    sampled = Collected((trained,), (trained, dropped), {"sampler/x": Ratio(1, 1)}, {"rollout/y": Ratio(2, 1)})
    first, second = spawn(collected_by_every_loop, 2, sampled)
    assert first == {loop.name: sampled for loop in Loop}
    assert second == {loop.name: replace(sampled, considered=()) for loop in Loop}
