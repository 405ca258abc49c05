"""msrun, MindSpore's launcher, for ranks without MindSpore: what `launch/msrun.sh` runs. Standard library only.

What msrun tells its workers is translated in dapo_mcore/launched.py, before torch is imported.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch.first_cause import first_cause
from launch.nodes import Launch, dry_run, launch_of, parser
from launch.preflight import check_devices, check_disk, check_interpreter, check_meeting_point, resolve

LOGS = Path("outputs") / "logs" / "msrun"
REFUSED = 2
# Workers inherit these, and take them for their own place; the last one torch_npu obeys, too.
STALE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "RANK_TABLE_FILE")
DIED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


def command(launch: Launch) -> list[str]:
    """Of this node. --join, else msrun returns 0 at once; --node_rank, else its workers learn no rank."""
    return [
        "msrun",
        f"--worker_num={launch.processes * launch.site.nodes}",
        f"--local_worker_num={launch.processes}",
        f"--master_addr={launch.master_addr}",
        f"--master_port={launch.master_port}",
        f"--node_rank={launch.node_rank}",
        f"--log_dir={LOGS}",
        "--join=True",
        "python",  # msrun knows an interpreter by this name alone
        *launch.program,
    ]


def worker_environment(launch: Launch, given: Mapping[str, str]) -> dict[str, str]:
    """What workers inherit; torch's ranks meet one port above msrun's scheduler, unless MASTER_PORT is exported.

    Raises:
        ValueError: `given` contradicts the run, or holds another launch's place.
    """
    for name in STALE:
        if name in given:
            raise ValueError(f"{name}={given[name]}: every worker would inherit this place in another launch; unset it")
    return {
        **launch.environment(given),
        "LOCAL_WORLD_SIZE": str(launch.processes),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", os.defpath)]),
    }


def find_msrun() -> str:
    found = shutil.which("msrun") or shutil.which("msrun", path=str(Path(sys.executable).parent))
    if found is None:
        raise ValueError("msrun: is not installed; it comes with the package mindspore; or use launch/torchrun.sh")
    return found


def check_machine(launch: Launch) -> None:
    """Raises ValueError for what would end the run later, and less clearly."""
    check_interpreter()
    check_devices(launch)
    check_disk()
    if launch.node_rank == 0:
        check_meeting_point(launch, launch.master_port)
        check_meeting_point(launch, launch.master_port + 1)
    else:
        resolve(launch.master_addr)


def run_msrun(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start msrun, pass on what it says, and say what failed first. A request to end reaches its workers."""
    child = subprocess.Popen(arguments, env=dict(environment), stderr=subprocess.PIPE, text=True, errors="replace")
    ended_by: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended_by.append(number)
        child.send_signal(signal.SIGINT)  # the only one at which msrun ends its workers

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    assert child.stderr is not None
    died = None
    for line in child.stderr:
        sys.stderr.write(line)
        died = died or DIED.search(line)
    code = child.wait()
    if ended_by:
        return 128 + ended_by[0]  # msrun itself calls that a success
    if died is not None:
        print(first_cause(f"worker process {died[1]}", int(died[2]), f"here or in {LOGS}"), file=sys.stderr, flush=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser("msrun").parse_args(arguments)
    try:
        launch = launch_of(given)
        if given.dry_run:
            print(dry_run(launch, [command(launch.on_node(rank)) for rank in range(launch.site.nodes)]))
            return 0
        environment = worker_environment(launch, os.environ)
        check_machine(launch)
        executable = find_msrun()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    LOGS.mkdir(parents=True, exist_ok=True)
    return run_msrun([executable, *command(launch)[1:]], {**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
