"""What is looked at before anything starts; every refusal names cause and cure. Standard library only."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from launch.nodes import Launch
from launch.sites import count_devices

FREE_GB = 1.0  # for logs, sockets and compiled code; the run itself checks for room for its checkpoints
RETRY_S = 1.0


def check_interpreter() -> None:
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{sys.executable}: has no torch; run `make install`, or name an interpreter with PYTHON")


def check_devices(launch: Launch) -> None:
    devices = count_devices(launch.site.platform, os.environ)
    if devices is not None and launch.processes > devices:
        raise ValueError(
            f"PROCESSES={launch.processes}: this machine has {devices} visible {launch.site.platform} devices, and "
            "there is one process per device; use that many, on every node"
        )


def check_disk() -> None:
    for folder in (Path(tempfile.gettempdir()), Path.cwd()):
        free_gb = shutil.disk_usage(folder).free / 1e9
        if free_gb < FREE_GB:
            raise ValueError(f"{folder}: {free_gb:.2f} GB free, {FREE_GB:.0f} GB are needed; make room there")


def check_meeting_point(launch: Launch, port: int) -> None:
    """On node 0: the master address is one of this machine's, and the port is free."""
    address = (resolve(launch.master_addr), port)
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"--master-port={port}: is taken on this machine; name another on every node"
                ) from None
            raise ValueError(
                f"--master-addr={launch.master_addr}: is no address of this machine ({error.strerror}); give "
                "--node-rank 0 to the machine that has it"
            ) from None


def wait_for_meeting_point(launch: Launch, wait_s: float) -> None:
    """On the other nodes: node 0 answers within `wait_s`."""
    address = (resolve(launch.master_addr), launch.master_port)
    end = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection(address, timeout=max(RETRY_S, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_S > end:
                raise ValueError(
                    f"--master-addr={launch.master_addr} --master-port={launch.master_port}: does not answer after "
                    f"{wait_s:.0f} s ({error}); start node 0, and see that no firewall is between"
                ) from None
        time.sleep(RETRY_S)


def resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise ValueError(f"--master-addr={host}: no such host ({error.strerror}); give its IP address") from None
