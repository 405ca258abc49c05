"""Ray jobs and Slurm: what would be started where, with stand-ins for the programs of the cluster."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

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
    client, _, entry = " ".join(command(launch, "http://h:1")).partition(" -- ")
    assert client.endswith("job submit --address=http://h:1")
    assert entry.startswith(f"bash -c cd {ROOT} && exec ")
    started = shlex.split(command(launch, "http://h:1")[-1])
    assert started[5:] == ["-m", "launch.ray_nodes", "--nodes=2", "--platform=npu", "--interface=eth7", "16", *TRAIN]


def test_a_ray_job_without_a_cluster_is_refused_by_its_address():
    with pytest.raises(
        ValueError, match=r"^--address=http://127\.0\.0\.1:1: no Ray dashboard answers.*ray start --head"
    ):
        check_cluster("http://127.0.0.1:1")


def test_a_cluster_that_listens_at_the_port_of_its_address_is_accepted():
    with socket.socket() as dashboard:
        dashboard.bind(("127.0.0.1", 0))
        dashboard.listen()
        check_cluster("http://{}:{}".format(*dashboard.getsockname()))


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


def test_slurm_without_an_allocation_says_how_to_get_one(slurm):
    bare = {name: value for name, value in slurm.items() if name != "SLURM_JOB_ID"}
    done = batch(bare, "8", *TRAIN)
    assert done.returncode != 0
    assert "start this with sbatch" in done.stderr
    assert batch(bare, "--dry-run", "8", *TRAIN).stdout.endswith("|--dry-run|8|" + "|".join(TRAIN) + "|\n")
