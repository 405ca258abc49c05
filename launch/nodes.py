"""What every launcher is told: processes per node, nodes, where they meet, and the module that all ranks run.

Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launch.environment import add_site_options, checked_environment, exports
from launch.sites import Site, site_of

HIGHEST_PORT = 65534  # msrun's workers meet one port above


@dataclass(frozen=True, slots=True)
class Launch:
    """One run over `site.nodes` machines, seen from one of them."""

    site: Site
    processes: int  # per node
    node_rank: int
    master_addr: str  # of node 0
    master_port: int
    program: tuple[str, ...]  # -m MODULE ARGUMENT ...

    def on_node(self, rank: int) -> Launch:
        return replace(self, node_rank=rank)

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """What the ranks get on top of `given`; ValueError when that contradicts the run."""
        meeting = {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        return checked_environment(self.site, {**given, **meeting})


def parser(name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"launch/{name}.sh",
        usage=f"launch/{name}.sh [--dry-run] [--nodes N --node-rank I --master-addr HOST [--master-port PORT] "
        "[--interface NAME]] PROCESSES -m MODULE [ARGUMENTS]",
        description="Runs a module in PROCESSES processes on this machine, the same on each of N machines.",
    )
    add_site_options(made)
    made.add_argument("--node-rank", type=int, help="of this machine; 0 is the one at the master address")
    made.add_argument("--master-addr", default="", help="where node 0 is reached")
    made.add_argument("--master-port", type=int, default=29500)
    made.add_argument("--wait", type=float, default=600.0, metavar="S", help="how long to wait for node 0")
    made.add_argument("--dry-run", action="store_true", help="print what would run on each node")
    made.add_argument("processes", type=int)
    made.add_argument("program", nargs=argparse.REMAINDER)
    return made


def launch_of(given: argparse.Namespace) -> Launch:
    """Raises ValueError for what cannot be, with the way out."""
    if given.processes < 1 or given.nodes < 1:
        name, value = ("PROCESSES", given.processes) if given.processes < 1 else ("--nodes", given.nodes)
        raise ValueError(f"{name}={value}: expected 1 or more")
    if len(given.program) < 2 or given.program[0] != "-m":
        raise ValueError(f"{' '.join(given.program[:2]) or 'nothing'}: expected -m MODULE, as -m dapo_mcore.train")
    if not 1024 <= given.master_port <= HIGHEST_PORT:
        raise ValueError(f"--master-port={given.master_port}: expected a port from 1024 to {HIGHEST_PORT}")
    if given.nodes > 1:
        _check_place(given)
    site = site_of(given.platform, given.nodes, given.interface, given.program)
    address = given.master_addr or "127.0.0.1"
    return Launch(site, given.processes, given.node_rank or 0, address, given.master_port, tuple(given.program))


def _check_place(given: argparse.Namespace) -> None:
    if not given.master_addr:
        raise ValueError(f"--nodes={given.nodes}: where do they meet? pass --master-addr, the address of node 0")
    if given.node_rank is None and not given.dry_run:
        raise ValueError(
            f"--nodes={given.nodes}: which of them is this one? pass --node-rank, 0 on the host of {given.master_addr}"
        )
    if given.node_rank is not None and not 0 <= given.node_rank < given.nodes:
        raise ValueError(f"--node-rank={given.node_rank}: {given.nodes} nodes count from 0 to {given.nodes - 1}")


def dry_run(launch: Launch, commands: Sequence[Sequence[str]]) -> str:
    """What would run on each node, as a shell script per node; `commands` has one per node."""
    lines: list[str] = []
    for rank, command in enumerate(commands):
        host = launch.master_addr if rank == 0 else "another machine"
        lines += [f"# node {rank} of {launch.site.nodes}, {host}", exports(launch.environment(os.environ))]
        lines += [shlex.join(command), ""]
    return "\n".join(lines)
