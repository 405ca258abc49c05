"""The rank of a process: what launchers say, and what is left over from another launch."""

from __future__ import annotations

import pytest

from dapo_mcore.launched import is_spokesman, place

RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_process_without_a_launcher_is_a_run_of_its_own():
    environment = {"PATH": "/bin"}
    assert place(environment) == (0, 1)
    assert is_spokesman(environment)
    assert environment == {"PATH": "/bin"}


def test_torchruns_rank_is_taken():
    assert place(dict(RANK)) == (1, 2)
    assert not is_spokesman(RANK)
    assert is_spokesman({**RANK, "RANK": "0"})


# what is in the environment, what the one error says
LEFT_OVER = [
    ({"RANK": "1"}, r"^RANK=1: WORLD_SIZE is not set.*unset RANK"),
    ({"WORLD_SIZE": "8"}, r"^WORLD_SIZE=8: RANK is not set.*unset WORLD_SIZE"),
    ({"LOCAL_RANK": "3"}, r"^LOCAL_RANK=3: RANK is not set.*unset LOCAL_RANK"),
    ({"RANK": "0", "WORLD_SIZE": "8"}, r"^RANK=0: MASTER_ADDR is not set.*launch/torchrun\.sh"),
    ({**RANK, "RANK": "2"}, r"^RANK=2: there is none in WORLD_SIZE=2; unset both"),
    ({**RANK, "RANK": "one"}, r"^RANK=one: expected a number"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16"}, r"^SLURM_STEP_NUM_TASKS=16: .*launch/slurm\.sbatch"),
]


@pytest.mark.parametrize(("environment", "says"), LEFT_OVER)
def test_variables_of_another_launch_are_refused_by_a_process_that_may_speak(environment, says):
    with pytest.raises(ValueError, match=says):
        place(dict(environment))
    assert is_spokesman(environment)


def test_of_tasks_without_ranks_one_speaks():
    tasks = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "3"} for i in range(3)]
    assert [is_spokesman(task) for task in tasks] == [True, False, False]
