"""The entry point of a Ray job: one `launch/torchrun.sh` on each of several machines of the cluster it runs in.

Needs ray, and this repository with its environment in the same folder of every machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.nodes import Launch, launch_of, parser

ROOT = Path(__file__).resolve().parents[1]
ONCE_S = 1.0  # for a launcher whose ranks do not train yet
RESOURCES = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}  # as Ray calls the devices of a platform
REFUSED = 2


class Machine:
    """Runs one node's launcher; what that prints goes to the job's log."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None

    def meeting_point(self) -> tuple[str, int]:
        """Its address in the cluster, and a port that is free there."""
        address = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def run(self, arguments: Sequence[str]) -> int:
        command = [sys.executable, "-m", "launch.torchrun", *arguments]
        self._launcher = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        return self._launcher.wait()

    def end(self) -> None:
        if self._launcher is not None and self._launcher.poll() is None:
            os.killpg(self._launcher.pid, signal.SIGTERM)
            try:
                self._launcher.wait(ONCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._launcher.pid, signal.SIGTERM)  # asked once, a run goes on to the end of its step
                self._launcher.wait()


def require_machines(launch: Launch) -> None:
    """Raises ValueError when the cluster has too few machines with enough devices."""
    resource = RESOURCES[launch.site.platform]
    machines = [
        (node["Resources"].get(resource, 0), node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]
    ]
    if sum(count >= launch.processes for count, _ in machines) < launch.site.nodes:
        found = ", ".join(f"{count:.0f} on {address}" for count, address in machines)
        raise ValueError(
            f"--nodes={launch.site.nodes}: needs as many machines with {launch.processes} {resource} each, the cluster "
            f"has {found}; `ray start` on more, or ask for less"
        )


def node_arguments(launch: Launch, address: str, port: int, rank: int) -> list[str]:
    """Of launch/torchrun.sh on one node."""
    meeting = [f"--nodes={launch.site.nodes}", f"--node-rank={rank}", f"--master-addr={address}",
               f"--master-port={port}", f"--interface={launch.site.interface}"]  # fmt: skip
    shared = meeting if launch.site.nodes > 1 else []
    return [*shared, f"--platform={launch.site.platform}", str(launch.processes), *launch.program]


def start_machines(launch: Launch) -> list[Any]:
    """One actor on each of as many machines, with the devices of its ranks."""
    resource = RESOURCES[launch.site.platform]
    bundle: dict[str, float] = (
        {resource: launch.processes, "CPU": 1} if resource != "CPU" else {"CPU": launch.processes}
    )
    group = placement_group([bundle] * launch.site.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    taken = {"num_gpus": launch.processes} if resource == "GPU" else {"resources": {resource: launch.processes}}
    devices: dict[str, Any] = {"num_cpus": launch.processes} if resource == "CPU" else {"num_cpus": 1, **taken}
    actor: Any = ray.remote(Machine)
    return [
        actor.options(
            max_concurrency=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            **devices,
        ).remote()
        for rank in range(launch.site.nodes)
    ]


def run_on(machines: Sequence[Any], launch: Launch) -> int:
    """The first launcher that fails ends the others; its exit code, or 0."""
    address, port = ray.get(machines[0].meeting_point.remote())
    runs = {
        machine.run.remote(node_arguments(launch, address, port, rank)): rank for rank, machine in enumerate(machines)
    }
    pending = list(runs)
    while pending:
        (done,), pending = ray.wait(pending)
        if code := ray.get(done):
            print(f"launch: node {runs[done]} failed first, with exit code {code}", file=sys.stderr, flush=True)
            ray.get([machine.end.remote() for machine in machines])
            return code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser("ray_job").parse_args(arguments)
    ray.init(address="auto")
    given.master_addr, given.node_rank = ray.util.get_node_ip_address(), 0
    try:
        launch = launch_of(given)
        launch.environment(os.environ)
        require_machines(launch)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return run_on(start_machines(launch), launch)


if __name__ == "__main__":
    sys.exit(main())
