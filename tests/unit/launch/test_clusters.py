"""Ray jobs and Slurm: what would be started where, with stand-ins for the programs of the cluster."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest

from launch.nodes import Launch
from launch.ray_job import check_cluster, command, main
from launch.sites import Site

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ("-m", "dapo_mcore.train", "experiment=mine", "data.prompt='two words'")
SRUN = """#!/usr/bin/env bash
# Runs the command as often as there are nodes, each with its number.
while [[ $1 == --* ]]; do shift; done
for id in 0 1; do SLURM_NODEID=$id "$@"; done
"""
PYTHON = """#!/usr/bin/env bash
printf '%s|' "$@"
echo
"""


def test_a_ray_job_starts_the_entry_point_in_the_repository_with_every_argument_as_it_is():
    launch = Launch(Site("npu", nodes=2, interface="eth7"), 16, 0, "", 29500, TRAIN)
    client, _, entry = " ".join(command(launch, "http://h:1", {})).partition(" -- ")
    assert "job submit --address=http://h:1 " in client
    assert entry.startswith(f"bash -c cd {ROOT} && exec ")
    started = shlex.split(command(launch, "http://h:1", {})[-1])
    assert started[5:] == ["-m", "launch.ray_nodes", "--nodes=2", "--platform=npu", "--interface=eth7", "16", *TRAIN]


def test_a_ray_job_takes_along_what_is_exported_for_the_run_and_nothing_else():
    launch = Launch(Site("npu"), 16, 0, "", 29500, TRAIN)
    given = {"HOME": "/root", "PYTHONPATH": "/my/verifiers", "HCCL_CONNECT_TIMEOUT": "600", "RAY_AUTH_TOKEN": "secret"}
    (option,) = [word for word in command(launch, "http://h:1", given) if word.startswith("--runtime-env-json=")]
    taken = {"PYTHONPATH": "/my/verifiers", "HCCL_CONNECT_TIMEOUT": "600"}
    assert json.loads(option.partition("=")[2]) == {"env_vars": taken}


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Address of a server that gives one answer, whatever it is asked."""
    with contextlib.ExitStack() as stack:

        def serve(answer: bytes) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def reply() -> None:
                with server.accept()[0] as client:
                    client.recv(4096)
                    client.sendall(answer)

            thread = Thread(target=reply)
            thread.start()
            stack.callback(thread.join)
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield serve


def test_a_ray_job_without_a_cluster_is_refused_by_its_address(answering):
    with pytest.raises(
        ValueError, match=r"^--address=http://127\.0\.0\.1:1: no Ray dashboard answers.*ray start --head"
    ):
        check_cluster("http://127.0.0.1:1", {})
    for other in (b"HTTP/1.1 404 Not Found\r\n\r\n", b"\0\0\6\4 not in words"):
        address = answering(other)
        with pytest.raises(ValueError, match=f"^--address={address}: what answers is no Ray dashboard; give"):
            check_cluster(address, {})


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://h:10001", "http://", "http://h:port", "http://h:0"])
def test_an_address_of_something_else_is_refused(address, capsys):
    assert main([f"--address={address}", "--platform=cpu", "2", *TRAIN]) == 2
    assert capsys.readouterr().err.startswith(f"error: --address={address}: expected http://HOST:PORT")


def test_a_cluster_that_asks_for_a_token_is_refused_until_one_is_sent(answering):
    unauthorized = b"HTTP/1.1 401 Unauthorized\r\n\r\n"
    with pytest.raises(ValueError, match=r"asks for a token; export RAY_AUTH_MODE=token.*~/\.ray/auth_token"):
        check_cluster(answering(unauthorized), {})
    check_cluster(answering(unauthorized), {"RAY_AUTH_MODE": "token"})


def test_a_ray_job_must_know_the_platform_of_the_cluster(capsys):
    assert main(["2", *TRAIN]) == 2
    assert capsys.readouterr().err.startswith("error: --platform: ")


def test_a_dry_run_of_a_ray_job_shows_what_is_submitted_and_the_environment(capsys):
    assert main(["--dry-run", "--platform=npu", "--nodes=2", "--interface=eth7", "16", *TRAIN]) == 0
    told = capsys.readouterr().out
    assert "job submit" in told
    assert "export HCCL_SOCKET_IFNAME=eth7" in told


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script on two nodes."""
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", "#!/usr/bin/env bash\nprintf 'n7\\nn8\\n'\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    given = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]", "INTERFACE": "eth7"}
    return {**os.environ, **given, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": path, "PYTHON": str(tmp_path / "python")}


def batch(environment, *arguments):
    command = [ROOT / "launch" / "slurm.sbatch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_slurm_starts_one_launcher_per_node_that_meet_on_the_first(slurm):
    done = batch(slurm, "8", *TRAIN)
    assert done.returncode == 0, done.stderr
    meeting = ["--nodes", "2", "--master-port", "23456", "--interface", "eth7", "--master-addr", "n7"]
    expected = [["-m", "launch.torchrun", "--node-rank", rank, *meeting, "8", *TRAIN, ""] for rank in "01"]
    assert [line.split("|") for line in done.stdout.splitlines()] == expected


def test_slurm_can_open_the_log_in_a_fresh_clone():
    """It makes no folders: without that of the log a job ends with nothing said anywhere."""
    log = re.search(r"^#SBATCH --output=(\S+)$", (ROOT / "launch" / "slurm.sbatch").read_text(), re.MULTILINE)
    assert log is not None
    assert Path(log[1]).parent == Path()


def test_what_every_node_would_refuse_slurm_refuses_once(slurm):
    bare = {**slurm, "INTERFACE": "", "GLOO_SOCKET_IFNAME": "", "PYTHON": sys.executable}
    done = batch(bare, "8", *TRAIN)
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error"]


def test_slurm_without_an_allocation_says_how_to_get_one(slurm):
    bare = {name: value for name, value in slurm.items() if name != "SLURM_JOB_ID"}
    done = batch(bare, "8", *TRAIN)
    assert done.returncode != 0
    assert "start this with sbatch" in done.stderr
    assert batch(bare, "--dry-run", "8", *TRAIN).stdout.endswith("|--dry-run|8|" + "|".join(TRAIN) + "|\n")
