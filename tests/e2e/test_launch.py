"""Launchers over two machines, both of them this one; ranks that are not alike, and ranks that die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout import ray_cluster
from tests.e2e.torchrun import LIMIT_S, OPTIONS, environment, errors, rows
from tools.tiny.model import random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TWICE = ("trainer.total_training_steps=2", "trainer.test_freq=0", "trainer.save_freq=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(random_model(tiny_config("qwen3_moe", tied=False), seed=0), folder)
    return folder


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [str(ROOT / "launch" / script), *map(str, arguments)]
    variables = {**environment(), "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=variables, text=True, **pipes)


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.terminate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two_nodes(processes: tuple[int, int], *program: object) -> list[subprocess.Popen[str]]:
    meeting = ("--nodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--interface=lo")
    return [start("torchrun.sh", *meeting, f"--node-rank={rank}", processes[rank], *program) for rank in (0, 1)]


def on_two_nodes(processes: tuple[int, int], *program: object) -> list[subprocess.CompletedProcess[str]]:
    return [end(node) for node in start_two_nodes(processes, *program)]


def training(model: Path, out: Path) -> list[str]:
    return ["-m", "dapo_mcore.train", *OPTIONS, *TWICE, f"model.path={model}", f"trainer.output_dir={out}"]


def test_two_nodes_train_the_quickstart(model, tmp_path):
    nodes = on_two_nodes((1, 1), *training(model, tmp_path))
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
    assert list(rows(tmp_path)) == [0, 1, 2]
    assert all(rows(tmp_path)[step]["actor/grad_norm"] > 0 for step in (1, 2))


def test_a_launcher_that_is_asked_to_end_lets_all_nodes_finish_the_step_and_save(model, tmp_path):
    """SIGTERM to the one of the two that does not have rank 0."""
    endless = "trainer.total_training_steps=1000"
    nodes = start_two_nodes((1, 1), *training(model, tmp_path), endless)
    try:
        while not rows(tmp_path).get(1) and nodes[0].poll() is None:
            time.sleep(0.05)
    finally:
        nodes[1].terminate()
        first, second = map(end, nodes)
    last = max(rows(tmp_path))
    assert (first.returncode, second.returncode) == (0, 128 + signal.SIGTERM), first.stderr + second.stderr
    assert f"stopped after step {last}: SIGUSR1 asked for it" in first.stdout
    assert second.stderr.endswith("launch: ended by SIGTERM, in order\n")
    assert not errors(first) + errors(second)
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    assert not (tmp_path / "hf_model").exists()


def test_nodes_with_different_numbers_of_processes_end_with_one_error(model, tmp_path):
    option = "actor.megatron.expert_model_parallel_size=1"
    nodes = on_two_nodes((1, 2), *training(model, tmp_path), option)
    assert [node.returncode for node in nodes] == [1, 1]
    told, *more = [*errors(nodes[0]), *errors(nodes[1]), nodes[0].stderr + nodes[1].stderr]
    assert len(more) == 1, more[-1]
    assert "has processes on its node 2, rank 0" in told
    assert "start every node with the same arguments" in told


def test_a_killed_rank_is_named_after_it_has_ended_the_others(tmp_path):
    done = end(start("torchrun.sh", 2, "-m", "tests.e2e.rank_program", "is_killed", tmp_path))
    assert done.returncode == 1
    assert re.search(r"^error: rank 1 on .* was ended by SIGKILL.*\n\Z", done.stderr, re.MULTILINE)
    assert len(errors(done)) == 1


def running(folder: Path) -> list[psutil.Process]:
    """Launchers and ranks of the program that was started with this folder."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in (process.info["cmdline"] or [])]


def wait_for_ranks(folder: Path, launcher: subprocess.Popen[str]) -> None:
    for rank in ("0", "1"):
        while not (folder / rank).exists():
            assert launcher.poll() is None, "the program ended before its ranks were there"
            time.sleep(0.05)


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    launcher = start("torchrun.sh", 2, "-m", "tests.e2e.rank_program", "waits", tmp_path)
    wait_for_ranks(tmp_path, launcher)
    family = running(tmp_path)
    launcher.kill()
    end(launcher)
    assert psutil.wait_procs(family, timeout=LIMIT_S)[1] == []


def wait_for_job_server(cluster: Cluster) -> None:
    """It refuses jobs until the agent of its machine is there."""
    server = JobSubmissionClient(f"http://{cluster.webui_url}")
    started = time.monotonic()
    while True:
        try:
            server.submit_job(entrypoint="true")
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() - started > LIMIT_S:
                raise


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of two machines with a core each, at the loopback address, with a job server."""
    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
    options["dashboard_agent_listen_port"] = 0  # a free one, as another Ray on this machine has the default
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    head = {**options, **dashboard, "no_monitor": True}  # which would start and stop machines
    with pytest.MonkeyPatch.context() as patch:  # else Ray replaces the address by one of the machine's
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else whether it asks for a token depends on who used Ray before
        made = ray_cluster.patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            ray_cluster.patiently(lambda: made.add_node(**options))
            wait_for_job_server(made)
            yield made
        finally:
            made.shutdown()


def submit(cluster: Cluster, *program: object) -> subprocess.Popen[str]:
    """A rank on each of the two machines."""
    address = f"--address=http://{cluster.webui_url}"
    return start("ray_job.sh", address, "--platform=cpu", "--nodes=2", "--interface=lo", 1, *program)


def test_a_job_submitted_to_a_cluster_trains_over_its_machines(cluster, model, tmp_path):
    done = end(submit(cluster, *training(model, tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows(tmp_path)) == [0, 1, 2]


def test_a_job_whose_rank_is_killed_fails_with_the_first_cause_and_ends_the_other(cluster, tmp_path):
    folder = tmp_path / "of 'two', [or more]"
    folder.mkdir()
    done = end(submit(cluster, "-m", "tests.e2e.rank_program", "is_killed", folder))
    assert done.returncode == 1, done.stdout + done.stderr
    *_, last = done.stdout.strip().splitlines()
    assert re.match(r"error: rank 1 on .* was ended by SIGKILL, before any other failed", last)
    assert psutil.wait_procs(running(folder), timeout=LIMIT_S)[1] == []


def test_a_job_that_is_stopped_leaves_nothing_behind(cluster, tmp_path):
    client = submit(cluster, "-m", "tests.e2e.rank_program", "waits", tmp_path)
    wait_for_ranks(tmp_path, client)
    family = running(tmp_path)
    server = JobSubmissionClient(f"http://{cluster.webui_url}")
    (job,) = [job.submission_id for job in server.list_jobs() if str(tmp_path) in job.entrypoint]
    assert job is not None
    server.stop_job(job)
    end(client)
    assert psutil.wait_procs(family, timeout=LIMIT_S)[1] == []
    assert server.get_job_status(job) is JobStatus.STOPPED


def test_a_cluster_that_is_too_small_is_refused_by_name(cluster):
    variables = {**environment(), "RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    options = ["--platform=cpu", "--interface=lo", "--nodes=2", "3", "-m", "tests.e2e.rank_program"]
    command = [sys.executable, "-m", "launch.ray_nodes", *options]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert "--nodes=2: needs as many machines with 3 CPU each, the cluster has 1 on 127.0.0.1, 1 on" in done.stderr


def test_an_engine_in_an_actor_gets_the_environment_of_engines(cluster, monkeypatch):
    given = {"TASK_QUEUE_ENABLE": "1", "PYTORCH_NPU_ALLOC_CONF": ""}
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv(ray_cluster.ENVIRONMENT, json.dumps(given))
    options = RayConfig(address=cluster.address)
    ray_cluster.connect(options)
    try:
        actor = ray_cluster.start_actor(options, devices=1)
        assert (
            ray.get(actor.__ray_call__.remote(lambda self, names: {n: os.environ[n] for n in names}, [*given])) == given
        )
    finally:
        with contextlib.suppress(NameError):
            ray.kill(actor)
        ray_cluster.disconnect()
