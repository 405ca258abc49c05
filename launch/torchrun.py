"""torchrun with this project's environment and checks: what `launch/torchrun.sh` runs.

Standard library, but for the agent itself: torch is imported when everything else has been checked.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence

from launch.first_cause import first_cause
from launch.nodes import Launch, dry_run, launch_of, parser
from launch.notice import Notice
from launch.preflight import (
    check_devices,
    check_disk,
    check_interpreter,
    check_meeting_point,
    wait_for_meeting_point,
)

REFUSED = 2
AT_ONCE = "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"  # not SIGTERM: the agent gives ranks 30 s, too little for a step


def agent_arguments(launch: Launch) -> list[str]:
    """Of torch.distributed.run on this node."""
    if launch.site.nodes == 1:
        meeting = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        meeting = [
            f"--nnodes={launch.site.nodes}",
            f"--node-rank={launch.node_rank}",
            f"--master-addr={launch.master_addr}",
            f"--master-port={launch.master_port}",
        ]
    return [*meeting, f"--nproc-per-node={launch.processes}", "-m", "launch.bound", *launch.program]


def command(launch: Launch) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *agent_arguments(launch)]


def check_machine(launch: Launch, wait_s: float) -> None:
    """Raises ValueError for what would end the run later, and less clearly."""
    check_interpreter()
    check_devices(launch)
    check_disk()
    if launch.site.nodes > 1 and launch.node_rank == 0:
        check_meeting_point(launch, launch.master_port)
    elif launch.site.nodes > 1:
        wait_for_meeting_point(launch, wait_s)


def run_agent(arguments: Sequence[str]) -> int:
    """Start the ranks, watch them, and say what failed first."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # says in 60 lines what is said below
    notice = Notice(lambda number: SignalException(f"got {number.name}", number))
    notice.listen()
    try:
        run(parse_args([AT_ONCE, *arguments]))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        who = f"rank {rank} on {socket.gethostname()} (process {failure.pid})"
        print(first_cause(who, failure.exitcode, "above, or with node 0"), file=sys.stderr, flush=True)
        return 1
    except SignalException as ended:
        print(f"launch: ended by {ended.sigval.name}", file=sys.stderr, flush=True)
        return 128 + ended.sigval
    if notice.received:
        print(f"launch: ended by {notice.received.name}, in order", file=sys.stderr, flush=True)
        return 128 + notice.received
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser("torchrun").parse_args(arguments)
    try:
        launch = launch_of(given)
        if given.dry_run:
            print(dry_run(launch, [command(launch.on_node(rank)) for rank in range(launch.site.nodes)]))
            return 0
        environment = launch.environment(os.environ)
        check_machine(launch, given.wait)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    os.environ.update(environment)
    return run_agent(agent_arguments(launch))


if __name__ == "__main__":
    sys.exit(main())
