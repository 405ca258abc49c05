"""The table of checks against the tools it calls and the documents that name it; what becomes of checks that fail."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from dapo_mcore.config_check import check as check_config
from dapo_mcore.train import load_config
from launch.nodes import launch_of
from launch.nodes import parser as launch_parser
from tools.acceptance import __main__ as program
from tools.acceptance import evidence, policy
from tools.acceptance.check import Check, Here, module
from tools.acceptance.checks import CHECKS
from tools.acceptance.execution import Verdict, make
from tools.acceptance.report import markdown
from tools.acceptance.training import RESUMED_AT
from tools.figures import Figure, as_json, read_figures

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "kernels").rglob("*.md"))]
ABOUT = {"machine": "m", "devices": 1, "device": "d", "platform": "cpu", "system": "s", "commit": "c", "load": 0.0,
         "versions": {}}  # fmt: skip


class Parsed(Exception):
    """The options of a tool were read without an error."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """As it is when the runs begin: the model is made, the first run of a resume has its checkpoint."""
    folder = tmp_path_factory.mktemp("acceptance")
    policy.config().save_pretrained(folder / "model")
    (folder / "run-resume" / "run" / "checkpoints" / f"step_{RESUMED_AT:06d}").mkdir(parents=True)
    return folder


def refuse_to_go_on(monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        original(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parse(command, monkeypatch, world=1):
    """Let the module that is called read its options, and nothing else."""
    interpreter, flag, name, *arguments = command
    assert [interpreter, flag] == [sys.executable, "-m"]
    if name == "launch.torchrun":
        launch = launch_of(launch_parser("torchrun").parse_args(arguments))
        parse([interpreter, *launch.program], monkeypatch, launch.processes)
    elif name == "dapo_mcore.train":
        check_config(load_config(arguments), world)
    elif name == "pytest":
        assert (ROOT / arguments[0]).is_dir()
    else:
        target = f"{name}.{arguments.pop(0)}" if name == "tools.bench" else name
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [target, *arguments])
            refuse_to_go_on(patched)
            main = importlib.import_module(target).main
            with pytest.raises(Parsed):
                main(arguments) if name == "tools.bench" else main()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_command_is_one_that_its_program_understands(check, platform, out, monkeypatch):
    for devices in (1, 2, 8):
        here = Here(platform, devices, out)
        if not check.obstacle(here):
            commands = check.commands(here, out / check.name)
            assert commands
            for command in commands:
                parse(command, monkeypatch)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (module("tools.doctor", "--jsn"), SystemExit),
        (module("tools.bench", "loss", "--device", "tpu"), SystemExit),
        (module("launch.torchrun", 2, "-m", "dapo_mcore.train", "experiment=quickstart", "rollout.m=4"), ValueError),
        (module("tools.acceptance.nothing"), ModuleNotFoundError),
    ],
)
def test_a_command_that_is_misspelt_is_not_understood(command, error, monkeypatch):
    with pytest.raises(error):
        parse(command, monkeypatch)


def test_no_two_checks_have_one_name():
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_the_documents_name_checks_that_exist():
    named = [
        (file.name, name)
        for file in DOCUMENTS
        for asked in re.findall(r"tools\.acceptance --only ([\w\- ]+)`", file.read_text())
        for name in asked.split()
    ]
    assert named
    assert [(file, name) for file, name in named if not any(check.is_asked_for([name]) for check in CHECKS)] == []


def test_a_check_is_asked_for_by_its_name_or_by_whole_words_it_begins_with():
    (check,) = [check for check in CHECKS if check.name == "run-expert-parallel"]
    assert all(check.is_asked_for(names) for names in ([], ["run"], ["run-expert"], ["loss", "run-expert-parallel"]))
    assert not any(check.is_asked_for(names) for names in (["ru"], ["loss"], ["run-expert-parallel-x"]))


def printing(*figures, code=0):
    return [sys.executable, "-c", f"print({as_json(figures)!r}); raise SystemExit({code})"]


def one(*commands, name="one", **options):
    return Check(name, "nothing", lambda here, out: list(commands), **options)


HELD, MISSED = Figure("time", 1.0, "s", bar=2.0), Figure("speed", 1.0, "GB/s", bar=2.0, at_least=True)
# check -> verdict, names of its figures, part of its note
OUTCOMES = {
    "a bar that is held": (one(printing(HELD)), Verdict.HOLDS, ["time"], ""),
    "no bar": (one(printing(Figure("time", 1.0))), Verdict.MEASURED, ["time"], ""),
    "one bar of two is missed": (one(printing(HELD, MISSED)), Verdict.MISSED, ["time", "speed"], ""),
    "not a number": (one(printing(Figure("time", float("nan"), bar=1.0))), Verdict.MISSED, ["time"], ""),
    "a failure that has figures": (one(printing(MISSED, code=1)), Verdict.FAILED, ["speed"], "log.txt"),
    "the first command fails": (
        one([sys.executable, "-c", "raise SystemExit('error: no such device')"], printing(HELD)),
        Verdict.FAILED, [], "error: no such device"),
    "silence": (one([sys.executable, "-c", "print(1)"]), Verdict.FAILED, [], "no figures"),
    "no end": (one([sys.executable, "-c", "import time; time.sleep(600)"], limit_s=0.0), Verdict.TIMED_OUT, [], "log"),
    "another platform": (one(printing(HELD), platforms=("npu",)), Verdict.NOT_HERE, [], "npu"),
    "too few devices": (one(printing(HELD), least_devices=4), Verdict.NOT_HERE, [], "4 devices"),
}  # fmt: skip


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_check_is_judged_by_its_end_and_by_its_bars(outcome, tmp_path):
    check, verdict, names, note = OUTCOMES[outcome]
    result = make(check, Here("cpu", 2, tmp_path))
    assert result.verdict is verdict
    assert [figure.name for figure in result.figures] == names
    assert note in result.note


def test_what_is_not_here_counts_neither_as_made_nor_as_failed(tmp_path):
    assert not Verdict.NOT_HERE.is_bad
    result = make(one(printing(HELD), platforms=("npu",)), Here("cpu", 2, tmp_path))
    assert "0 checks made, 0 of them failed, 1 not here" in markdown(ABOUT, [result])


def test_the_program_goes_on_after_a_failure_and_ends_with_1(tmp_path, monkeypatch, capsys):
    checks = (one(printing(MISSED), name="first"), one(printing(HELD), name="second"))
    monkeypatch.setattr(program, "CHECKS", checks)
    monkeypatch.setattr(program, "machine", lambda here: ABOUT)
    report = tmp_path / "report.md"
    arguments = ["--platform", "cpu", "--out", str(report)]
    assert program.main(arguments) == 1
    written = json.loads(report.with_suffix(".json").read_text())
    assert "| `first` | nothing | MISSED | speed | 1 GB/s | >= 2 GB/s **missed** |" in report.read_text()
    assert [check["verdict"] for check in written["checks"]] == ["MISSED", "holds"]
    assert "| `second` | nothing | holds | time | 1 s | <= 2 s |" in report.read_text()
    assert program.main([*arguments, "--only", "second"]) == 0
    with pytest.raises(SystemExit):
        program.main([*arguments, "--only", "third"])
    assert "--only third: no check begins so" in capsys.readouterr().err


def test_the_report_has_a_row_for_each_figure_with_all_its_columns(tmp_path):
    here = Here("cpu", 2, tmp_path)
    results = [make(check, here) for check, *_ in OUTCOMES.values() if check.limit_s]
    table = [line for line in markdown(ABOUT, results).splitlines() if line.startswith("|")]
    assert len(table) == 2 + sum(max(1, len(result.figures)) for result in results)
    assert {line.count("|") for line in table} == {7}


def test_figures_are_read_from_the_last_line_that_has_some(tmp_path):
    log = tmp_path / "log.txt"
    lines = [as_json([MISSED]), as_json([HELD], missing=["x"]), '{"another": 1}', "{not json", "the end"]
    log.write_text("\n".join(lines))
    assert read_figures(log) == [HELD]


def rows(folder, *values):
    folder.mkdir()
    lines = [{"step": step, "actor/loss": value, "time/push_s": step} for step, value in values]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_the_same_where_every_step_they_share_is_but_for_its_time(tmp_path):
    run = rows(tmp_path / "run", (1, 0.5), (2, 0.25), (3, 0.125))
    resumed = rows(tmp_path / "resumed", (3, 0.125))
    other = rows(tmp_path / "other", (2, 0.25), (3, 0.125 + 2**-52))
    line = json.loads((resumed / "metrics.jsonl").read_text()) | {"time/push_s": 99.0}
    (resumed / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert [figure.value for figure in evidence.same(run, resumed)] == [1, 0]
    assert [figure.value for figure in evidence.same(run, other)] == [2, 1]
    compared, _ = evidence.same(run, rows(tmp_path / "later", (4, 1.0)))
    assert not compared.holds, "nothing was compared"


def test_the_largest_gap_of_a_probe_is_told_and_a_run_without_one_is_refused(tmp_path):
    run = rows(tmp_path / "run", (1, 0.5), (2, 0.5), (3, 0.5))
    with pytest.raises(ValueError, match=r"weights\.attest=full"):
        evidence.probe(run, 0.3)
    times = {f"time/{phase}_s": 1.0 for phase in ("push", "rollout", "update")}
    lines = [{"step": step, "weights/probe_gap": gap, **times} for step, gap in ((1, 0.1), (2, 0.4), (3, 0.2))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gap, *_ = evidence.probe(run, 0.3)
    assert (gap.value, gap.holds) == (0.4, False)


def test_a_skipped_test_is_none_that_passed(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="3" skipped="3" failures="0" errors="0"/></testsuites>')
    assert [figure.holds for figure in evidence.tests(report)] == [False, True, True]
    report.write_text('<testsuites><testsuite tests="4" skipped="2" failures="1" errors="0"/></testsuites>')
    assert [figure.value for figure in evidence.tests(report)] == [1, 1, 2]


def test_the_list_says_what_would_run_and_runs_nothing(tmp_path, capsys):
    report = tmp_path / "none" / "report.md"
    assert program.main(["--platform", "npu", "--devices", "8", "--list", "--out", str(report)]) == 0
    told = capsys.readouterr().out
    assert "--layout tp=2,sp=1,pp=2,vpp=2,ep=4" in told
    assert "not here" not in told
    assert not report.parent.exists()


def test_a_model_of_ones_own_has_to_be_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--platform", "cpu", "--list", "--model", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err


def test_a_dense_model_is_not_cut_by_experts(tmp_path):
    shutil.copy(ROOT / "configs" / "models" / "Qwen2.5-7B.json", tmp_path / "config.json")
    here = Here("npu", 8, tmp_path / "out", tmp_path)
    (eager,) = [check for check in CHECKS if check.name == "run-eager"]
    (apart,) = [check for check in CHECKS if check.name == "run-expert-parallel"]
    assert "actor.megatron.expert_model_parallel_size=1" in eager.commands(here, tmp_path)[0]
    assert apart.obstacle(here) == "the model has no experts"
