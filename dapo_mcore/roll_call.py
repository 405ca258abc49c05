"""Ranks of one run must be alike: the same packages, the same code, the same options, as many processes per node."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dapo_kernels
import torch.distributed as dist

import dapo_mcore
from dapo_mcore.config import RunConfig
from dapo_mcore.rollout.leader import lead
from dapo_mcore.rollout.ranks import Ranks

INSTALL, START = "install the same on every node", "start every node with the same arguments"
CHECK_OUT = "check out the same commit on every node"
CURES = {"dapo_mcore": CHECK_OUT, "dapo_kernels": CHECK_OUT, "options": START, "processes on its node": START}


@dataclass(frozen=True, slots=True)
class Presence:
    host: str
    facts: Mapping[str, str]  # what must be alike: name -> value


def call_the_roll(config: RunConfig) -> None:
    """Collective.

    Raises:
        ValueError: on rank 0, naming a rank that is not like it and in what; LeaderError elsewhere.
    """
    ranks = Ranks.world()
    present = ranks.gather(presence(config))
    lead(partial(refuse_strangers, present))
    if ranks.group is not None:
        dist.destroy_process_group(ranks.group)


def refuse_strangers(present: Sequence[Presence]) -> None:
    """Raises ValueError for the first rank that is not like rank 0."""
    first, *others = present
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.facts.keys() | other.facts.keys()):
            mine, theirs = (facts.get(name, "none") for facts in (first.facts, other.facts))
            if mine != theirs:
                raise ValueError(
                    f"rank {rank} on {other.host} has {name} {theirs}, rank 0 on {first.host} has {mine}; "
                    + CURES.get(name, INSTALL)
                )


def presence(config: RunConfig) -> Presence:
    """Of this rank."""
    facts = {name: version for name in packages() if (version := _version(name))}
    facts["python"] = platform.python_version()
    for package in (dapo_mcore, dapo_kernels):
        files = sorted(Path(package.__path__[0]).rglob("*.py"))
        facts[package.__name__] = _digest(*(file.read_bytes() for file in files))
    facts["options"] = _digest(repr(config).encode())
    facts["processes on its node"] = os.environ.get("LOCAL_WORLD_SIZE", "?")
    return Presence(socket.gethostname(), facts)


def packages() -> list[str]:
    """What a run may need, on whatever platform; as the project's own metadata has it."""
    needed = [line for line in importlib.metadata.requires("dapo_mcore") or () if "dev" not in line.partition(";")[2]]
    return ["mindspeed", *(re.split(r"[^\w.-]", line)[0] for line in needed)]  # mindspeed is on no index


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]
