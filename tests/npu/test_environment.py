"""The environment a launcher sets, above all on Ascend: what trainer and engines get, and what is refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.platform import platform
from launch.environment import ROLLOUT, checked_environment, environment, explain, exports
from launch.sites import Role, Site, count_devices, find_platform, option, site_of
from launch.variables import TABLE

ROOT = Path(__file__).resolve().parents[2]
COLOCATED = Site("npu")
APART = Site("npu", engines_apart=True)
TWO_NODES = Site("npu", nodes=2)
NICS = dict.fromkeys(("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "eth7")


def engines_environment(site: Site, given: dict[str, str]) -> dict[str, str]:
    """As a Ray actor of the run sees it: the trainer's environment, and what differs for engines."""
    trainer = {**given, **checked_environment(site, given)}
    return {**trainer, **json.loads(trainer[ROLLOUT])}


def test_a_trainer_with_an_engine_inside_gets_what_both_can_live_with():
    values = checked_environment(COLOCATED, {})
    assert values["TASK_QUEUE_ENABLE"] == "1"
    assert values["PYTORCH_NPU_ALLOC_CONF"] == ""
    assert values["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert ROLLOUT not in values


def test_trainer_and_engines_apart_get_each_their_own():
    trainer, engines = checked_environment(APART, {}), engines_environment(APART, {})
    assert (trainer["TASK_QUEUE_ENABLE"], engines["TASK_QUEUE_ENABLE"]) == ("2", "1")
    assert trainer["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert engines["PYTORCH_NPU_ALLOC_CONF"] == ""
    assert engines["VLLM_ASCEND_ENABLE_NZ"] == "0"


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("engines_apart", [True, False])
@pytest.mark.parametrize("nodes", [1, 2])
def test_no_process_that_samples_has_expandable_segments_or_a_queue_that_breaks_graphs(nodes, engines_apart, graphs):
    site = Site("npu", nodes=nodes, engines_apart=engines_apart, graphs=graphs)
    values = engines_environment(site, NICS) if engines_apart else checked_environment(site, NICS)
    assert "expandable_segments:True" not in values.get("PYTORCH_NPU_ALLOC_CONF", "")
    assert not graphs or values["TASK_QUEUE_ENABLE"] in ("0", "1")
    assert values["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert int(values["HCCL_CONNECT_TIMEOUT"]) < 1800
    assert int(values["HCCL_EXEC_TIMEOUT"]) < 1800


def test_engines_that_need_nothing_else_are_told_nothing():
    assert ROLLOUT not in checked_environment(Site("cpu", engines_apart=True), {})


def test_a_trainer_stays_on_the_loopback_interface_unless_its_engines_may_be_elsewhere():
    assert checked_environment(Site("cpu"), {})["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in checked_environment(Site("cpu", engines_apart=True), {})


def test_what_the_user_exported_stays():
    given = {"HCCL_CONNECT_TIMEOUT": "600", "OMP_NUM_THREADS": "4", "TASK_QUEUE_ENABLE": "0"}
    assert checked_environment(COLOCATED, given).items() >= given.items()


def test_a_value_for_the_trainer_does_not_reach_engines_that_need_another():
    given = {"TASK_QUEUE_ENABLE": "2", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:256"}
    assert checked_environment(APART, given).items() >= given.items()
    engines = engines_environment(APART, given)
    assert engines["TASK_QUEUE_ENABLE"] == "1"
    assert engines["PYTORCH_NPU_ALLOC_CONF"] == ""


def test_one_interface_serves_every_library():
    values = checked_environment(Site("npu", nodes=2, interface="eth7"), {})
    assert values.items() >= NICS.items()


# what the caller does wrong: site, what is exported, what the one error says
WRONG = {
    "expandable segments under an engine that sleeps": (
        COLOCATED, {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
        r"^PYTORCH_NPU_ALLOC_CONF=expandable_segments:True: .*sleep mode.*unset it"),
    "expandable segments by the newer name, in the engines": (
        COLOCATED, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True",
                    "PYTORCH_NPU_ALLOC_CONF": ""},
        r"^PYTORCH_ALLOC_CONF=.*sleep mode"),
    "both names of the allocator's options": (
        APART, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, r"^PYTORCH_NPU_ALLOC_CONF=.*PYTORCH_ALLOC_CONF=.*unset"),
    "a task queue of 2 with graphs": (
        COLOCATED, {"TASK_QUEUE_ENABLE": "2"}, r"^TASK_QUEUE_ENABLE=2: .*graphs.*rollout\.enforce_eager=true"),
    "weights in a fractal format": (
        COLOCATED, {"VLLM_ASCEND_ENABLE_NZ": "1"}, r"^VLLM_ASCEND_ENABLE_NZ=1: .*unset it"),
    "weights in a fractal format, engines apart": (
        APART, {"VLLM_ASCEND_ENABLE_NZ": "1"}, r"^VLLM_ASCEND_ENABLE_NZ=1: .*unset it"),
    "an engine in a process of its own": (
        COLOCATED, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, r"^VLLM_ENABLE_V1_MULTIPROCESSING=1: .*unset it"),
    "HCCL patient for longer than the process group": (
        COLOCATED, {"HCCL_EXEC_TIMEOUT": "1800"}, r"^HCCL_EXEC_TIMEOUT=1800: .*after 1800 s.*less than 1800"),
    "HCCL connecting for longer than the process group": (
        COLOCATED, {"HCCL_CONNECT_TIMEOUT": "7200"}, r"^HCCL_CONNECT_TIMEOUT=7200: .*less than 1800"),
    "HCCL connecting for too short a time": (
        COLOCATED, {"HCCL_CONNECT_TIMEOUT": "60"}, r"^HCCL_CONNECT_TIMEOUT=60: .*120"),
    "a timeout that is no number": (COLOCATED, {"HCCL_EXEC_TIMEOUT": "1h"}, r"^HCCL_EXEC_TIMEOUT=1h: .*seconds"),
    "port ranges that overlap": (
        COLOCATED, {"HCCL_HOST_SOCKET_PORT_RANGE": "60000-61000"},
        r"^HCCL_NPU_SOCKET_PORT_RANGE=61000-61050: overlaps HCCL_HOST_SOCKET_PORT_RANGE=60000-61000"),
    "the rendezvous within a port range": (
        COLOCATED, {"MASTER_PORT": "60050"}, r"^MASTER_PORT=60050: overlaps HCCL_HOST_SOCKET_PORT_RANGE=60000-60050"),
    "ports that are none": (
        COLOCATED, {"HCCL_NPU_SOCKET_PORT_RANGE": "61050-61000"}, r"^HCCL_NPU_SOCKET_PORT_RANGE=61050-61000: expected"),
    "no interface for gloo on two nodes": (
        TWO_NODES, {**NICS, "GLOO_SOCKET_IFNAME": ""}, r"^GLOO_SOCKET_IFNAME: is not set, and 2 nodes.*--interface"),
    "no interface for HCCL on two nodes": (
        TWO_NODES, {"GLOO_SOCKET_IFNAME": "eth7", "TP_SOCKET_IFNAME": "eth7"}, r"^HCCL_SOCKET_IFNAME: is not set"),
    "the loopback interface on two nodes": (
        TWO_NODES, {**NICS, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "10.0.0.1"}, r"^GLOO_SOCKET_IFNAME=lo: .*other"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_contradiction_is_refused_with_its_cure(wrong):
    site, given, says = WRONG[wrong]
    with pytest.raises(ValueError, match=says) as refused:
        checked_environment(site, given)
    assert "\n" not in str(refused.value)


# the same exports where they are right
RIGHT = {
    "expandable segments in a trainer without an engine": (
        APART, {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}),
    "expandable segments that are off": (COLOCATED, {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False"}),
    "a task queue of 2 without graphs": (Site("npu", graphs=False), {"TASK_QUEUE_ENABLE": "2"}),
    "HCCL connecting for the shortest time it takes": (COLOCATED, {"HCCL_CONNECT_TIMEOUT": "120"}),
    "neighbouring port ranges": (COLOCATED, {"HCCL_HOST_SOCKET_PORT_RANGE": "60900-60999"}),
    "two nodes on one machine": (TWO_NODES, {**NICS, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}),
    "Ascend's variables on another platform": (Site("cuda"), {"TASK_QUEUE_ENABLE": "2", "HCCL_EXEC_TIMEOUT": "9999"}),
}  # fmt: skip


@pytest.mark.parametrize("right", RIGHT)
def test_what_does_not_contradict_the_run_is_kept(right):
    site, given = RIGHT[right]
    assert {**given, **checked_environment(site, given)}.items() >= given.items()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("role", Role)
def test_no_process_gets_two_values_for_a_variable(platform, role):
    for nodes in (1, 2):
        for graphs in (True, False):
            site = Site(platform, nodes, role is not Role.colocated, graphs)
            names = [row.name for row in TABLE if row.applies(site, role)]
            assert len(names) == len(set(names))


def test_variables_of_other_platforms_stay_away():
    assert not [name for name in checked_environment(Site("cpu"), {}) if name.startswith(("HCCL", "NCCL", "TASK"))]
    assert "NCCL_SOCKET_IFNAME" in checked_environment(Site("cuda", nodes=2, interface="eth7"), {})


def test_a_shell_reads_the_values_as_they_are_meant():
    values = {"A": "", "B": "two words", "C": "it's $HOME"}
    shell = subprocess.run(
        ["bash", "-c", exports(values) + '\nprintf "%s|" "$A" "$B" "$C"'], capture_output=True, text=True
    )
    assert shell.stdout == "|two words|it's $HOME|"
    assert shlex.split(exports(environment(APART, Role.trainer, {})))[0] == "export"


def test_the_explanation_has_every_row_and_marks_the_users_values():
    told = explain(COLOCATED, {"HCCL_EXEC_TIMEOUT": "700"})
    assert "HCCL_EXEC_TIMEOUT=700 *\n" in told
    here, _, elsewhere = told.partition("not here:")
    assert all(row.reason in told for row in TABLE)
    assert "VLLM_CPU_OMP_THREADS_BIND" in elsewhere
    assert "VLLM_CPU_OMP_THREADS_BIND" not in here


def test_the_explanation_shows_what_each_process_gets():
    told = explain(APART, {"TASK_QUEUE_ENABLE": "0"}).partition("not here:")[0]
    assert "TASK_QUEUE_ENABLE=0 *\n    in trainer" in told
    assert "TASK_QUEUE_ENABLE=1\n    in rollout" in told
    assert "TASK_QUEUE_ENABLE=2" not in explain(COLOCATED, {}).partition("not here:")[0]


def test_train_explains_the_environment_without_importing_torch():
    program = (
        "import sys, dapo_mcore.train as train\n"
        "code = train.main(['--explain-env', '--platform', 'npu', '--nodes', '2'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "platform npu, 2 nodes" in told.stdout
    assert "HCCL_SOCKET_IFNAME" in told.stdout


def test_the_site_is_read_from_options_and_from_the_experiment_they_name(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.sites.EXPERIMENTS", tmp_path)
    (tmp_path / "mine.yaml").write_text("rollout: {backend: ray, enforce_eager: true}\n")
    assert option(["experiment=mine"], "rollout.backend") == "ray"
    assert option(["experiment=mine", "rollout.backend=colocated"], "rollout.backend") == "colocated"
    assert option(["experiment=mine"], "rollout.enforce_eager") == "true"
    assert option(["experiment=other"], "rollout.backend") == ""


def test_of_options_given_twice_the_last_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.sites.EXPERIMENTS", tmp_path)
    (tmp_path / "mine.yaml").write_text("rollout: {backend: ray}\n")
    assert option(["rollout.backend=ray", "rollout.backend=colocated"], "rollout.backend") == "colocated"
    assert option(["experiment=mine", "experiment=other"], "rollout.backend") == ""


@pytest.mark.parametrize(("value", "graphs"), [("true", False), ("True", False), ("false", True)])
def test_engines_capture_graphs_unless_they_are_eager(value, graphs):
    assert site_of("npu", 1, "", [f"rollout.enforce_eager={value}"]).graphs is graphs


def test_a_platform_that_is_named_is_taken():
    assert find_platform({"DAPO_PLATFORM": "npu"}) == "npu"
    assert find_platform({}) == find_platform({"DAPO_PLATFORM": "tpu"}) == platform().name


def test_devices_are_counted_by_their_files_or_by_what_is_visible(tmp_path):
    for name in ("davinci0", "davinci1", "davinci_manager", "nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    assert count_devices("npu", {}, tmp_path) == 2
    assert count_devices("npu", {"ASCEND_RT_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert count_devices("npu", {"ASCEND_RT_VISIBLE_DEVICES": "0, 1,"}, tmp_path) == 2
    assert count_devices("cuda", {}, tmp_path) == 1
    assert count_devices("cpu", {}, tmp_path) is None
