"""Launches over one and several machines: what would run, and what is refused before anything does."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from dapo_mcore.actor.parallel import init_process_group
from dapo_mcore.rollout import ray_cluster
from dapo_mcore.rollout.vllm_env import DEFAULTS, FIXED
from launch.environment import ROLLOUT, checked_environment
from launch.first_cause import first_cause
from launch.nodes import Launch, launch_of, parser
from launch.preflight import check_devices, check_disk, check_meeting_point, wait_for_meeting_point
from launch.sites import Site
from launch.torchrun import agent_arguments, check_machine, command, main
from launch.variables import PROCESS_GROUP_TIMEOUT_S

TRAIN = ("-m", "dapo_mcore.train", "experiment=quickstart")
BOUND = ("-m", "launch.bound")  # to the life of the launcher
PAIR = ("--nodes=2", "--master-addr=10.0.0.1", "--interface=eth7")
ROOT = Path(__file__).resolve().parents[3]


def launch(*options: str) -> Launch:
    return launch_of(parser("torchrun").parse_args([*options, *TRAIN]))


def at(address: str, port: int, node_rank: int = 0) -> Launch:
    return Launch(Site("cpu", nodes=2), 1, node_rank, address, port, TRAIN)


def test_one_machine_meets_at_a_port_of_torchruns_choice():
    assert agent_arguments(launch("2")) == [
        "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", *BOUND, *TRAIN]  # fmt: skip


def test_two_machines_differ_by_their_rank_alone():
    first = launch(*PAIR, "--node-rank=0", "8")
    assert agent_arguments(first) == ["--nnodes=2", "--node-rank=0", "--master-addr=10.0.0.1", "--master-port=29500",
                                      "--nproc-per-node=8", *BOUND, *TRAIN]  # fmt: skip
    second = agent_arguments(first.on_node(1))
    assert [word for word in second if word not in agent_arguments(first)] == ["--node-rank=1"]


# options, what the one error says
REFUSED = [
    (("0",), r"^PROCESSES=0: expected 1 or more"),
    (("--nodes=0", "2"), r"^--nodes=0: expected 1 or more"),
    (("--nodes=2", "8"), r"^--nodes=2: where do they meet\? pass --master-addr"),
    (("--nodes=2", "--master-addr=h", "8"), r"^--nodes=2: which of them.*pass --node-rank, 0 on the host of h"),
    (("--nodes=2", "--master-addr=h", "--node-rank=2", "8"), r"^--node-rank=2: 2 nodes count from 0 to 1"),
    (("--nodes=2", "--master-addr=h", "--node-rank=-1", "8"), r"^--node-rank=-1: 2 nodes count from 0 to 1"),
    (("--master-port=80", "8"), r"^--master-port=80: expected a port from 1024"),
    (("--master-port=65535", "8"), r"^--master-port=65535: expected a port from 1024 to 65534"),  # msrun takes two
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        launch(*options)


def test_a_program_is_a_module():
    with pytest.raises(ValueError, match=r"^train\.py: expected -m MODULE"):
        launch_of(parser("torchrun").parse_args(["2", "train.py"]))


def test_the_port_of_the_launch_counts_and_not_one_that_was_exported():
    reserved, free = {"MASTER_PORT": "60010"}, {"MASTER_PORT": "29500"}
    Launch(Site("npu"), 8, 0, "127.0.0.1", 29500, TRAIN).environment(reserved)
    with pytest.raises(ValueError, match=r"^MASTER_PORT=60010: overlaps"):
        Launch(Site("npu"), 8, 0, "127.0.0.1", 60010, TRAIN).environment(free)


def test_a_missing_interface_is_one_error_before_anything_starts(capsys, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert main(["--nodes=2", "--master-addr=10.0.0.1", "--node-rank=0", "--platform=npu", "8", *TRAIN]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: GLOO_SOCKET_IFNAME: is not set, and 2 nodes")
    assert told.count("\n") == 1


def test_a_dry_run_prints_what_each_node_would_run_as_a_shell_takes_it(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "HCCL_CONNECT_TIMEOUT": "600"})
    assert main([*PAIR, "--platform=npu", "--dry-run", "8", *TRAIN, "data.prompt='two words'"]) == 0
    nodes = capsys.readouterr().out.split("# node ")[1:]
    assert [node.splitlines()[0] for node in nodes] == ["0 of 2, 10.0.0.1", "1 of 2, another machine"]
    for rank, node in enumerate(nodes):
        script = "\n".join(node.splitlines()[1:])
        assert "export HCCL_SOCKET_IFNAME=eth7" in script
        assert "export HCCL_CONNECT_TIMEOUT=600" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert f"--node-rank={rank}" in script
        assert "data.prompt='\"'\"'two words'\"'\"''" in script


def test_a_program_of_the_launcher_is_torchruns_own():
    assert command(launch("2"))[1:3] == ["-m", "torch.distributed.run"]


def test_there_are_as_many_processes_as_devices(monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3")
    run = Launch(Site("npu"), 8, 0, "127.0.0.1", 29500, TRAIN)
    with pytest.raises(ValueError, match=r"^PROCESSES=8: this machine has 4 visible npu devices.*use that many"):
        check_devices(run)
    check_devices(Launch(Site("npu"), 4, 0, "127.0.0.1", 29500, TRAIN))
    check_devices(Launch(Site("cpu"), 8, 0, "127.0.0.1", 29500, TRAIN))


def test_a_full_disk_is_named(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, 10**12, 10**8))
    with pytest.raises(ValueError, match=r"0\.10 GB free, 1 GB are needed; make room"):
        check_disk()


def test_the_master_port_must_be_free_and_the_master_address_must_be_here():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--master-port={port}: is taken on this machine"):
            check_meeting_point(at("127.0.0.1", port), port)
        with pytest.raises(ValueError, match=r"^--master-addr=192\.0\.2\.1: is no address of this machine"):
            check_meeting_point(at("192.0.2.1", port), port)
        wait_for_meeting_point(at("127.0.0.1", port, node_rank=1), wait_s=0.0)
    check_meeting_point(at("127.0.0.1", port), port)
    with pytest.raises(ValueError, match=rf"--master-port={port}: does not answer after 0 s.*start node 0"):
        wait_for_meeting_point(at("127.0.0.1", port, node_rank=1), wait_s=0.0)


def test_a_port_that_was_left_a_moment_ago_is_free():
    """The kernel keeps it for a minute when the side that listened, as torch's store does, was the first to close."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as other:
            listening.accept()[0].close()
            assert other.recv(1) == b""
    check_meeting_point(at("127.0.0.1", port), port)


def test_node_0_looks_at_its_port_and_the_others_wait_for_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for node_rank, says in ((0, "is taken on this machine"), (1, "does not answer after 0 s")):
            with pytest.raises(ValueError, match=rf"--master-port={port}: {says}"):
                check_machine(at("127.0.0.1", port, node_rank), wait_s=0.0)


def test_a_host_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"^--master-addr=nowhere\.invalid: no such host"):
        wait_for_meeting_point(at("nowhere.invalid", 29500, node_rank=1), wait_s=0.0)


def test_who_was_ended_by_a_signal_could_not_tell_and_who_failed_has():
    assert first_cause("rank 3", -9, "above").startswith("error: rank 3 was ended by SIGKILL")
    assert first_cause("rank 3", -15, "above").startswith("error: rank 3 was ended by SIGTERM")
    assert first_cause("rank 3", 1, "above") == "launch: rank 3 failed first, with exit code 1; its error is above"


def test_the_table_agrees_with_what_the_program_sets_itself():
    assert inspect.signature(init_process_group).parameters["timeout_s"].default == PROCESS_GROUP_TIMEOUT_S
    assert ray_cluster.ENVIRONMENT == ROLLOUT
    assert checked_environment(Site("cpu"), {}).items() >= {**FIXED, **DEFAULTS}.items()


@pytest.mark.parametrize("script", ["torchrun.sh", "msrun.sh"])
def test_a_script_starts_in_the_repository_from_wherever_it_is_called(script, tmp_path):
    arguments = [str(ROOT / "launch" / script), "--dry-run", "2", *TRAIN]
    environment = {**os.environ, "PYTHON": str(ROOT / ".venv" / "bin" / "python")}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# node 0 of 1, 127.0.0.1\nexport ")
    assert done.stdout.rstrip().endswith(" ".join(TRAIN))
