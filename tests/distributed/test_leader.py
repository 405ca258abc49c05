"""Rank 0 may take its time: data sets are read and checkpoints hashed while the other ranks wait."""

from dapo_mcore.train import LOST_PEER
from tests.distributed.leader_ranks import wait_longer_than_the_world_does
from tools.certificate.spawn import spawn


def test_a_decision_may_take_longer_than_collectives_may() -> None:
    first, second = spawn(wait_longer_than_the_world_does, 2)
    assert first[0] == second[0] == "decided"
    assert LOST_PEER.search(second[1]), "a collective that waited in vain is a consequence, not a cause"
