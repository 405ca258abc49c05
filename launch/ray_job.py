"""Submits a run to a running Ray cluster, what `launch/ray_job.sh` does. Standard library only.

The job is launch/ray_nodes.py, which starts launch/torchrun.sh on as many machines of the cluster.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from launch.environment import exports
from launch.nodes import Launch, launch_of, parser
from launch.sites import PLATFORMS
from launch.variables import TABLE

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "http://127.0.0.1:8265"
REFUSED = 2
ANSWER_S = 10.0  # for the dashboard


def command(launch: Launch, address: str, given: Mapping[str, str]) -> list[str]:
    """Of Ray's own client; the job runs in this folder, which every machine has, with what `given` has exported."""
    site = launch.site
    options = [f"--nodes={site.nodes}", f"--platform={site.platform}", f"--interface={site.interface}"]
    entry = [sys.executable, "-m", "launch.ray_nodes", *options, str(launch.processes), *launch.program]
    job = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(entry)}"
    client = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={address}"]
    variables = {name: given[name] for name in ("PYTHONPATH", *sorted({row.name for row in TABLE})) if name in given}
    return [*client, f"--runtime-env-json={json.dumps({'env_vars': variables})}", "--", "bash", "-c", job]


def host_of(address: str) -> str:
    """Raises ValueError when this is no address of a dashboard."""
    try:
        place = urlsplit(address)
        if place.scheme in ("http", "https") and place.hostname and place.port != 0:
            return place.hostname
    except ValueError:  # of a port that is no number
        pass
    raise ValueError(f"--address={address}: expected http://HOST:PORT, as `ray start` prints it for its dashboard")


def check_cluster(address: str, given: Mapping[str, str]) -> None:
    """Raises ValueError when no job server answers at `address`, or one that asks for a token nobody will send."""
    try:
        urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except (HTTPError, HTTPException) as answer:
        if getattr(answer, "code", None) != HTTPStatus.UNAUTHORIZED:
            raise ValueError(
                f"--address={address}: what answers is no Ray dashboard; give the address that `ray start` prints"
            ) from None
        if given.get("RAY_AUTH_MODE") != "token":
            raise ValueError(
                f"--address={address}: this cluster asks for a token; export RAY_AUTH_MODE=token, and its token where "
                "Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            ) from None
    except OSError as error:
        raise ValueError(
            f"--address={address}: no Ray dashboard answers ({error}); start the cluster with `ray start --head`, with "
            "ray[default] installed, or give the address that it printed"
        ) from None


def dry_run(launch: Launch, address: str) -> str:
    """What is submitted, and the environment of the ranks on each node."""
    nodes = [f"# each of {launch.site.nodes} nodes\n{exports(launch.environment(os.environ))}"]
    return "\n".join([f"# here\n{shlex.join(command(launch, address, os.environ))}\n", *nodes])


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("ray_job")
    made.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS), help="of the dashboard")
    given = made.parse_args(arguments)
    try:
        given.master_addr, given.node_rank = host_of(given.address), 0  # the cluster chooses another one
        if given.platform == "auto":
            raise ValueError(f"--platform: the cluster's machines may be others than this; pass one of {PLATFORMS[0]}, "
                             f"{', '.join(PLATFORMS[1:])}")  # fmt: skip
        launch = launch_of(given)
        if given.dry_run:
            print(dry_run(launch, given.address))
            return 0
        launch.environment(os.environ)
        check_cluster(given.address, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return subprocess.run(command(launch, given.address, os.environ)).returncode


if __name__ == "__main__":
    sys.exit(main())
