"""Submits a run to a running Ray cluster, what `launch/ray_job.sh` does. Standard library only.

The job is launch/ray_nodes.py, which starts launch/torchrun.sh on as many machines of the cluster.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from launch.environment import exports
from launch.nodes import Launch, launch_of, parser
from launch.sites import PLATFORMS

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "http://127.0.0.1:8265"
REFUSED = 2


def command(launch: Launch, address: str) -> list[str]:
    """Of Ray's own client; the job runs in this folder, which every machine has."""
    site = launch.site
    options = [f"--nodes={site.nodes}", f"--platform={site.platform}", f"--interface={site.interface}"]
    entry = [sys.executable, "-m", "launch.ray_nodes", *options, str(launch.processes), *launch.program]
    job = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(entry)}"
    client = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={address}"]
    return [*client, "--", "bash", "-c", job]  # the client quotes


def check_cluster(address: str) -> None:
    """Raises ValueError when nothing listens at `address`."""
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname or "", place.port or 80), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"--address={address}: no Ray dashboard answers ({error}); start the cluster with `ray start --head`, with "
            "ray[default] installed, or give the address that it printed"
        ) from None


def dry_run(launch: Launch, address: str) -> str:
    """What is submitted, and the environment of the ranks on each node."""
    nodes = [f"# each of {launch.site.nodes} nodes\n{exports(launch.environment(os.environ))}"]
    return "\n".join([f"# here\n{shlex.join(command(launch, address))}\n", *nodes])


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("ray_job")
    made.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS), help="of the dashboard")
    given = made.parse_args(arguments)
    given.master_addr, given.node_rank = "the cluster's choice", 0
    try:
        if given.platform == "auto":
            raise ValueError(f"--platform: the cluster's machines may be others than this; pass one of {PLATFORMS[0]}, "
                             f"{', '.join(PLATFORMS[1:])}")  # fmt: skip
        launch = launch_of(given)
        if given.dry_run:
            print(dry_run(launch, given.address))
            return 0
        check_cluster(given.address)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return subprocess.run(command(launch, given.address)).returncode


if __name__ == "__main__":
    sys.exit(main())
