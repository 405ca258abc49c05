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

import pytest
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout import ray_cluster
from tests.e2e.torchrun import LIMIT_S, OPTIONS, environment, errors, rows
from tools.tiny.model import random_model, save_folder, tiny_config

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = os.environ.get("RAY_DASHBOARD", "")  # of a cluster with two cores: http://127.0.0.1:8265
ONCE = ("trainer.total_training_steps=1", "trainer.test_freq=0", "trainer.save_freq=0")


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


def start_two_nodes(processes: tuple[int, int], *program: object) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--nodes=2", "--master-addr=127.0.0.1", f"--master-port={port}", "--interface=lo")
    return [start("torchrun.sh", *meeting, f"--node-rank={rank}", processes[rank], *program) for rank in (0, 1)]


def on_two_nodes(processes: tuple[int, int], *program: object) -> list[subprocess.CompletedProcess[str]]:
    return [end(node) for node in start_two_nodes(processes, *program)]


def training(model: Path, out: Path) -> list[str]:
    return ["-m", "dapo_mcore.train", *OPTIONS, *ONCE, f"model.path={model}", f"trainer.output_dir={out}"]


def test_two_nodes_train_one_run(model, tmp_path):
    nodes = on_two_nodes((1, 1), *training(model, tmp_path))
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
    assert list(rows(tmp_path)) == [0, 1]
    assert rows(tmp_path)[1]["actor/grad_norm"] > 0


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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of two machines with a core each, at the loopback address."""
    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:  # else Ray replaces the address by one of the machine's
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        try:
            made.add_node(**options)
            yield made
        finally:
            made.shutdown()


def ray_nodes(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "launch.ray_nodes", "--platform=cpu", "--interface=lo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_job_in_a_ray_cluster_runs_one_launcher_per_machine(cluster, tmp_path):
    done = ray_nodes(cluster, "--nodes=2", 1, "-m", "tests.e2e.rank_program", "ends", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "2 lo", "1": "2 lo"}


def test_a_cluster_that_is_too_small_is_refused_by_name(cluster, tmp_path):
    done = ray_nodes(cluster, "--nodes=2", 3, "-m", "tests.e2e.rank_program", "ends", tmp_path)
    assert done.returncode == 2
    assert "--nodes=2: needs as many machines with 3 CPU each, the cluster has 1 on 127.0.0.1, 1 on" in done.stderr


@pytest.mark.skipif(not DASHBOARD, reason="RAY_DASHBOARD names none: ray[default] is not in the locked environment")
def test_a_job_submitted_to_a_cluster_trains(model, tmp_path):
    done = end(start("ray_job.sh", f"--address={DASHBOARD}", "--platform=cpu", 2, *training(model, tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows(tmp_path)) == [0, 1]


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
