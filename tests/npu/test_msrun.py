"""Ranks under msrun: the one in fakes/, or a real one, of mindspore, where MSRUN names it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dapo_mcore.launched import from_msrun, is_scheduler, is_spokesman, place
from launch.msrun import STALE, check_machine, command, worker_environment
from launch.nodes import Launch, launch_of, parser
from launch.sites import Site
from tests.e2e.torchrun import LIMIT_S, OPTIONS, rows
from tools.tiny.model import random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fakes" / "msrun"
MSRUN = Path(os.environ.get("MSRUN", FAKE))
PROGRAM = ("-m", "tests.npu.msrun_program")
real = pytest.mark.skipif(MSRUN == FAKE, reason="MSRUN names no msrun of mindspore")
CLEAN = {name: value for name, value in os.environ.items() if name not in (*STALE, "MASTER_PORT", "MASTER_ADDR")}
WORKER = {
    "MS_ROLE": "MS_WORKER", "MS_NODE_ID": "5", "MS_WORKER_NUM": "8", "DEVICE_ID": "1", "LOCAL_WORLD_SIZE": "4",
    "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118", "RANK_ID": "0", "RANK_SIZE": "8",
}  # fmt: skip


def free_port() -> int:
    """One with a free neighbour: msrun's scheduler has the first, torch's store the second."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]


def environment(**given: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), str(MSRUN.parent), os.environ["PATH"]])
    return {**CLEAN, "PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "FAKE_MSRUN_PATIENCE_S": "300", **given}


def run(*arguments: object, given: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in arguments]
    return subprocess.run(command, cwd=ROOT, env={**environment(), **(given or {})}, capture_output=True, text=True,
                          timeout=300)  # fmt: skip


def launched(caller: str, folder: Path, processes: int = 2, **given: str) -> subprocess.CompletedProcess[str]:
    """By our launcher, on one machine."""
    port = f"--master-port={free_port()}"
    return run(sys.executable, "-m", "launch.msrun", port, processes, *PROGRAM, caller, folder, given=given)


def msrun(caller: str, folder: Path, *options: str, **given: str) -> subprocess.CompletedProcess[str]:
    """By a user, or by one of two nodes."""
    return run(MSRUN, f"--log_dir={folder}", *options, "python", *PROGRAM, caller, folder, given=given)


def places(folder: Path) -> list[dict[str, str]]:
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(found, key=lambda one: int(one["RANK"]))


def is_one_run(folder: Path, size: int) -> bool:
    return [(one["RANK"], one["WORLD_SIZE"]) for one in places(folder)] == [(str(i), str(size)) for i in range(size)]


def test_our_launcher_gives_every_process_its_place(tmp_path):
    done = launched("ours", tmp_path, RANK_ID="7", DEVICE_ID="7", MS_NODE_ID="7")  # of an earlier launch
    assert done.returncode == 0, done.stderr
    assert is_one_run(tmp_path, 2)
    for index, one in enumerate(places(tmp_path)):
        assert one["LOCAL_RANK"] == str(index)
        assert one["LOCAL_WORLD_SIZE"] == "2"
        assert one["GROUP_RANK"] == "0"
        assert one["MASTER_ADDR"] == "127.0.0.1"


def test_two_nodes_are_numbered_through(tmp_path):
    for node in ("0", "1"):
        options = ("--worker_num=4", "--local_worker_num=2", f"--node_rank={node}", "--join=True")
        assert msrun("ours", tmp_path, *options, LOCAL_WORLD_SIZE="2").returncode == 0
    assert is_one_run(tmp_path, 4)
    assert [(one["GROUP_RANK"], one["LOCAL_RANK"]) for one in places(tmp_path)] == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]  # fmt: skip


def test_without_a_node_rank_there_is_one_error_that_says_what_to_pass(tmp_path):
    done = msrun("ours", tmp_path, "--worker_num=4", "--local_worker_num=2", "--join=True", LOCAL_WORLD_SIZE="2")
    assert done.returncode == 1
    assert "pass --node_rank" in done.stdout
    assert places(tmp_path) == []


# caller, how many processes think what
WRONG = {
    "trusts_rank_id": ("--worker_num=4", "--local_worker_num=2", "--join=True"),  # the scheduler's 0, twice
    "scheduler_is_a_rank": ("--worker_num=2", "--local_worker_num=2", "--join=True"),
    "numbers_by_device": ("--worker_num=4", "--local_worker_num=2", "--node_rank=1", "--join=True"),
    "trusts_rank": ("--worker_num=2", "--local_worker_num=2", "--join=True"),
}


@pytest.mark.parametrize("caller", WRONG)
def test_the_contract_catches_a_program_that_mistakes_its_place(caller, tmp_path):
    given = {"RANK": "1", "WORLD_SIZE": "2"} if caller == "trusts_rank" else {}
    msrun(caller, tmp_path, *WRONG[caller], LOCAL_WORLD_SIZE="2", **given)
    ranks = [one["RANK"] for one in places(tmp_path)]
    expected = {"trusts_rank_id": ["0", "0"], "scheduler_is_a_rank": ["0", "0", "1"], "numbers_by_device": ["0", "1"],
                "trusts_rank": ["1", "1"]}  # fmt: skip
    assert ranks == expected[caller]
    assert not is_one_run(tmp_path, 4 if "4" in WRONG[caller][0] else 2)


@pytest.mark.skipif(MSRUN != FAKE, reason="the real one waits for ever")
def test_the_contract_catches_a_scheduler_that_does_not_end(tmp_path):
    options = ("--worker_num=1", "--local_worker_num=1", "--join=True")
    done = msrun("scheduler_stays", tmp_path, *options, LOCAL_WORLD_SIZE="1", FAKE_MSRUN_PATIENCE_S="0.5")
    assert done.returncode == 3
    assert msrun("ours", tmp_path, *options, LOCAL_WORLD_SIZE="1").returncode == 0


def test_without_join_a_failure_is_no_failure_and_so_our_launcher_joins(tmp_path):
    assert msrun("fails", tmp_path, "--worker_num=1", "--local_worker_num=1").returncode == 0
    launch = Launch(Site("cpu"), 1, 0, "127.0.0.1", 29500, PROGRAM)
    assert "--join=True" in command(launch)


def test_a_killed_worker_ends_the_others_and_is_named(tmp_path):
    done = launched("is_killed", tmp_path)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [done.stderr.splitlines()[-1]]
    assert "was ended by SIGKILL" in done.stderr


def test_a_failing_worker_ends_the_others_and_has_told_why(tmp_path):
    done = launched("fails", tmp_path)
    assert done.returncode == 1
    assert "error: a reason" in done.stdout
    assert "failed first, with exit code 1" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), folder)
    return folder


def quickstart(model: Path, out: Path, steps: int) -> list[str]:
    """On two processes, by our launcher."""
    options = [*OPTIONS, f"trainer.total_training_steps={steps}", f"model.path={model}", f"trainer.output_dir={out}"]
    return [str(ROOT / "launch" / "msrun.sh"), f"--master-port={free_port()}", "2", "-m", "dapo_mcore.train", *options]


@real
def test_the_quickstart_trains(model, tmp_path):
    given = environment(PYTHON=sys.executable)
    done = subprocess.run(quickstart(model, tmp_path, 2), env=given, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert list(rows(tmp_path)) == [0, 1, 2]
    assert all(rows(tmp_path)[step]["actor/grad_norm"] > 0 for step in (1, 2))


def is_worker(process: psutil.Process, rank: str) -> bool:
    try:
        return process.environ().get("MS_NODE_ID") == rank
    except psutil.NoSuchProcess:  # the scheduler has ended, and is not waited for yet
        return False


@real
def test_the_quickstart_ends_with_a_worker_that_is_killed_and_names_it(model, tmp_path):
    given, pipes = environment(PYTHON=sys.executable), {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen(quickstart(model, tmp_path, 1000), env=given, text=True, **pipes)
    started = time.monotonic()
    try:
        while 1 not in rows(tmp_path) and launcher.poll() is None and time.monotonic() - started < LIMIT_S:
            time.sleep(0.1)
        family = psutil.Process(launcher.pid).children(recursive=True)
        worker = next(one for one in family if is_worker(one, "1"))
        worker.kill()
        _, told = launcher.communicate(timeout=LIMIT_S)
    finally:
        launcher.terminate()
    assert launcher.returncode == 1
    assert f"worker process {worker.pid} was ended by SIGKILL" in told.splitlines()[-1]
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.parametrize("name", STALE)
def test_the_launcher_refuses_places_of_another_launch(name):
    launch = Launch(Site("cpu"), 1, 0, "127.0.0.1", 29500, PROGRAM)
    with pytest.raises(ValueError, match=rf"^{name}=3: .*unset it"):
        worker_environment(launch, {name: "3"})


def test_workers_run_under_the_interpreter_of_the_launcher():
    """msrun calls it `python`."""
    values = worker_environment(Launch(Site("cpu"), 1, 0, "127.0.0.1", 29500, PROGRAM), {"PATH": "/bin"})
    assert values["PATH"] == f"{Path(sys.executable).parent}:/bin"


def test_both_ports_of_a_launch_must_be_free():
    port = free_port()
    for taken in (port, port + 1):
        with socket.socket() as other:
            other.bind(("127.0.0.1", taken))
            with pytest.raises(ValueError, match=rf"--master-port={taken}: is taken"):
                check_machine(Launch(Site("cpu"), 1, 0, "127.0.0.1", port, PROGRAM))


def watched(script: str) -> subprocess.Popen[str]:
    """Our launcher around a program in the place of msrun."""
    stands_for_msrun = [sys.executable, "-c", f"import signal, sys\n{script}"]
    program = f"import os, sys; from launch.msrun import run_msrun; sys.exit(run_msrun({stands_for_msrun}, os.environ))"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_of_several_workers_that_ended_the_first_is_named():
    told = "[ERROR] Worker process {} exit with exception. Error code: {}."
    _, error = watched(f"sys.exit('{told.format(11, -9)}\\n{told.format(12, -15)}')").communicate()
    assert "error: worker process 11 was ended by SIGKILL" in error
    assert "worker process 12 was" not in error


def test_a_request_to_end_reaches_msrun_as_the_one_it_knows_and_is_no_success():
    waits = "signal.pthread_sigmask(signal.SIG_BLOCK, [2]); sys.stderr.write('there\\n'); signal.sigwait([2])"
    with watched(waits) as launcher:
        assert launcher.stderr is not None
        assert launcher.stderr.readline() == "there\n"
        launcher.send_signal(signal.SIGTERM)
    assert launcher.returncode == 128 + signal.SIGTERM


def test_a_launch_over_two_nodes_is_the_same_on_both_but_for_the_node_rank():
    given = parser("msrun").parse_args(["--nodes=2", "--node-rank=0", "--master-addr=10.0.0.1", "8", *PROGRAM])
    first = launch_of(given)
    commands = [command(replace(first, node_rank=rank)) for rank in (0, 1)]
    assert commands[0][:6] == ["msrun", "--worker_num=16", "--local_worker_num=8", "--master_addr=10.0.0.1",
                               "--master_port=29500", "--node_rank=0"]  # fmt: skip
    assert [word for word in commands[1] if word not in commands[0]] == ["--node_rank=1"]
    assert commands[0][-3:] == ["python", *PROGRAM]


def test_a_worker_of_msrun_is_translated_for_torch():
    assert from_msrun(WORKER) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1",
                                  "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "8119"}  # fmt: skip


# what is wrong with a worker's variables: changes, what the error names and how to cure it
FAULTS = {
    "no node rank": ({"MS_NODE_ID": None}, r"^MS_NODE_ID: is not set .*pass --node_rank"),
    "a rank of another launch": ({"RANK": "0"}, r"^RANK=0: msrun says MS_NODE_ID=5; .*unset"),
    "a world of another launch": ({"WORLD_SIZE": "2"}, r"^WORLD_SIZE=2: msrun says MS_WORKER_NUM=8; .*unset"),
    "nodes that differ": ({"MS_WORKER_NUM": "7"}, r"^MS_WORKER_NUM=7: not as many processes on every node"),
    "a device that does not fit the rank": ({"DEVICE_ID": "0"}, r"^MS_WORKER_NUM=8: not as many processes"),
    "processes per node unknown": ({"LOCAL_WORLD_SIZE": None}, r"^LOCAL_WORLD_SIZE: is not set.*launch/msrun\.sh"),
    "a rank that is no number": ({"MS_NODE_ID": "x"}, r"^MS_NODE_ID=x: expected a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_workers_variables_that_cannot_be_are_refused(fault):
    changes, says = FAULTS[fault]
    changed = {name: value for name, value in {**WORKER, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=says):
        place(changed)


def test_one_process_tells_what_all_of_a_node_suffer_from():
    for missing in ({}, {"MS_NODE_ID"}):
        workers = [{**WORKER, "MS_NODE_ID": str(i), "DEVICE_ID": str(i), "RANK_ID": "0"} for i in range(3)]
        told = [is_spokesman({k: v for k, v in worker.items() if k not in missing}) for worker in workers]
        assert told == [True, False, False]


def test_ranks_that_torchrun_gave_win_over_what_msrun_left():
    left = {**WORKER, "MS_ROLE": "MS_SCHED"}
    ours = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    assert not is_scheduler({**left, **ours})
    assert place({**WORKER, **ours}) == (1, 2)


def test_ranks_that_agree_with_msrun_win_with_their_own_meeting_point():
    ours = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "1234"}
    given = {**WORKER, **ours}
    assert place(given) == (5, 8)
    assert given.items() >= ours.items()


def test_the_scheduler_ends_before_anything_is_imported_or_read():
    program = (
        "import sys, dapo_mcore.train as train\n"
        "code = train.main(['no such option'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = run(sys.executable, "-c", program, given={"MS_ROLE": "MS_SCHED", "RANK_ID": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
