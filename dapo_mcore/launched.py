"""Which rank this process is: what torchrun says, or what msrun says in words of its own. Imports no torch.

msrun (MindSpore's launcher) numbers processes in MS_NODE_ID and starts one more with the same command, a scheduler
that a program without MindSpore has no use for. Its RANK_ID is no rank: the scheduler's 0 leaks into workers.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

BY_TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun in each of its workers, and by nothing else
TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_scheduler(environment: Mapping[str, str]) -> bool:
    """Whether msrun started this process as its scheduler, which has nothing to do and must end for msrun to end."""
    return environment.get("MS_ROLE") == "MS_SCHED" and BY_TORCHRUN not in environment


def is_msrun_worker(environment: Mapping[str, str]) -> bool:
    return environment.get("MS_ROLE") == "MS_WORKER" and BY_TORCHRUN not in environment


def is_spokesman(environment: Mapping[str, str]) -> bool:
    """Whether this process tells what is wrong before there are ranks that can agree on it; the others only fail."""
    if is_msrun_worker(environment):
        return environment.get("MS_NODE_ID", environment.get("DEVICE_ID")) == "0"
    if all(name in environment for name in TOGETHER):
        rank, size = environment["RANK"], environment["WORLD_SIZE"]
        return rank == "0" or not (rank.isdigit() and size.isdigit() and int(rank) < int(size))
    return environment.get("SLURM_PROCID", "0") == "0"


def place(environment: MutableMapping[str, str]) -> tuple[int, int]:
    """Rank and world size; what torch.distributed reads is added to `environment` when msrun started this process.

    Raises:
        ValueError: variables are missing, or are left over from another launch.
    """
    if is_msrun_worker(environment):
        environment.update(from_msrun(environment))
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if not given:
        _refuse_bare_srun(environment)
        return 0, 1
    if missing := [name for name in TOGETHER if name not in environment]:
        raise ValueError(
            f"{given[0]}={environment[given[0]]}: {missing[0]} is not set, so it is left over from another launch; "
            f"unset {' '.join(given)}, or start with launch/torchrun.sh"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(f"RANK={rank}: there is none in WORLD_SIZE={world_size}; unset both, they are left over")
    return rank, world_size


def _refuse_bare_srun(environment: Mapping[str, str]) -> None:
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun gives its tasks no ranks, so each would be a run of its own; let it "
            "start one launch/torchrun.sh per node, as launch/slurm.sbatch does"
        )


def from_msrun(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed reads, from a worker's variables of msrun (MindSpore 2.10); what is set already stays.

    Raises:
        ValueError: msrun has given no global rank, nodes differ in devices, or RANK is of another launch.
    """
    if "MS_NODE_ID" not in environment:
        raise ValueError(
            "MS_NODE_ID: is not set (RANK_ID does not replace it: on the master it is the scheduler's); "
            "pass --node_rank to msrun on every node"
        )
    if "LOCAL_WORLD_SIZE" not in environment:
        raise ValueError("LOCAL_WORLD_SIZE: is not set, and msrun does not give it; start with launch/msrun.sh, or "
                         "export the number of processes per node")  # fmt: skip
    rank, world_size, local_rank, local_size = (
        _number(environment, name) for name in ("MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID", "LOCAL_WORLD_SIZE")
    )
    for name, of_msrun, theirs in (("RANK", rank, "MS_NODE_ID"), ("WORLD_SIZE", world_size, "MS_WORKER_NUM")):
        if environment.get(name, str(of_msrun)) != str(of_msrun):
            raise ValueError(f"{name}={environment[name]}: msrun says {theirs}={of_msrun}; {name} is left over from "
                             "another launch, unset it before starting msrun")  # fmt: skip
    if local_size < 1 or world_size % local_size or rank % local_size != local_rank:
        raise ValueError(
            f"MS_WORKER_NUM={world_size}: not as many processes on every node (LOCAL_WORLD_SIZE={local_size}, "
            f"DEVICE_ID={local_rank} of MS_NODE_ID={rank}); start as many on each, msrun numbers them by that"
        )
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(rank // local_size),
        "MASTER_ADDR": environment.get("MS_SCHED_HOST", "127.0.0.1"),
        "MASTER_PORT": str(_number(environment, "MS_SCHED_PORT") + 1),  # the scheduler may still hold its own
    }
    return {name: environment.get(name, value) for name, value in found.items()}


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise ValueError(f"{name}={value}: expected a number, which the launcher sets; start with one of launch/")
    return int(value)
