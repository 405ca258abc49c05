"""Starting a Ray cluster on a machine that is busy."""

from __future__ import annotations

import pytest

from dapo_mcore.rollout.ray_cluster import STARTS, patiently

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


class Machine:
    """Whose daemons come up after so many attempts; what Ray says before that."""

    def __init__(self, attempts: int, says: str = SLOW) -> None:
        self.left, self.says = attempts, says

    def start(self) -> str:
        self.left -= 1
        if self.left:
            raise Exception(self.says)  # noqa: TRY002 - as Ray does
        return "up"


@pytest.mark.parametrize("attempts", range(1, STARTS + 1))
def test_daemons_that_are_slow_get_another_chance(attempts):
    assert patiently(Machine(attempts).start) == "up"


def test_daemons_that_are_always_slow_do_not():
    machine = Machine(STARTS + 1)
    with pytest.raises(Exception, match="timed out during startup"):
        patiently(machine.start)
    assert machine.left == 1


def test_any_other_failure_is_told_at_once():
    machine = Machine(2, says="object_store_memory is larger than /dev/shm")
    with pytest.raises(Exception, match="object_store_memory"):
        patiently(machine.start)
    assert machine.left == 1
