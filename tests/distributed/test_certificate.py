"""No layout and no option changes the update; an update that is wrong does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.wrong_updates import measure_wrong
from tools.certificate.cases import Case, all_cases, write_models, write_truths
from tools.certificate.layouts import DENSE, LAYOUTS, MOE, SEEING_DENSE, SEEING_MOE
from tools.certificate.measure import Measured
from tools.certificate.options import OPTIONS, SPLIT, TOWER
from tools.certificate.spawn import spawn
from tools.certify import certify_here, main, summary

CASES = list(all_cases())
LAYOUT = {layout.name: layout for layout in LAYOUTS}
ASKED_FOR = {
    "DP2": (DENSE, MOE),
    "DP4": (DENSE, MOE),
    "TP2": (DENSE, SEEING_DENSE),
    "TP2+SP": (DENSE, MOE, SEEING_MOE),
    "PP2": (DENSE, MOE, SEEING_MOE),
    "PP2xVPP2": (DENSE, MOE),
    "CP2": (DENSE, MOE, SEEING_MOE),
    "EP2": (MOE, SEEING_MOE),
    "EP4": (MOE,),
    "ETP2": (MOE,),
    "DP2xETP2": (MOE,),
    "TP2xEP2": (MOE,),
    "TP2xPP2": ("qwen3_tied",),
    "TP2xCP2": (DENSE,),
    "TP2+SPxCP2": (DENSE, MOE),
    "PP2xCP2": (DENSE,),
    "PP2xCP2xEP2": (MOE,),
    "single, recompute full": (SEEING_MOE,),
    "DP2, overlap": (SEEING_MOE,),
    "CP2xEP2, overlap": (SEEING_MOE,),
}
WRONG_CASES = {
    "mask dropped": [("DP2", DENSE, "DAPO"), ("CP2", MOE, "DAPO"), ("PP2", DENSE, "DAPO")],
    "mean of micro-batch means": [("DP2", DENSE, "DAPO"), ("TP2+SP", MOE, "DAPO"), ("PP2", DENSE, "DAPO")],
    "KL averaged over micro-batches": [("DP2", DENSE, "KL k3"), ("CP2", MOE, "KL k2"), ("PP2", DENSE, "KL k1")],
    "balance loss unscaled under sequence parallelism": [("TP2+SP", MOE, "router losses")],
    "tower summed over tensor ranks": [("TP2+SP", SEEING_MOE, TOWER)],
    "split images without their sum": [("CP2xEP2, overlap", SEEING_MOE, SPLIT), ("TP2", SEEING_DENSE, SPLIT)],
}
WRONG_IDS = [(name, " | ".join(case)) for name, cases in WRONG_CASES.items() for case in cases]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    return {str(m.case): m for m in certify_here(CASES, tmp_path_factory.mktemp("certificate"))}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Measured]:
    folder: Path = tmp_path_factory.mktemp("wrong")
    cases = {
        name: [Case(LAYOUT[layout], family, option) for layout, family, option in selected]
        for name, selected in WRONG_CASES.items()
    }
    everything = [case for selected in cases.values() for case in selected]
    write_models(everything, folder)
    write_truths(everything, folder)
    return spawn(measure_wrong, 2, cases, folder)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_metrics_and_gradients_equal_one_float64_process(case: Case, certificate: dict[str, Measured]) -> None:
    found = certificate[str(case)]
    assert found.loss <= 2e-6
    assert found.gradient.error <= 2e-6, found.gradient
    assert found.metric.error <= 2e-6, found.metric


@pytest.mark.parametrize(("name", "case"), WRONG_IDS)
def test_a_wrong_update_fails(name: str, case: str, wrong: dict[tuple[str, str], Measured]) -> None:
    found = wrong[name, case]
    assert not found.is_within
    assert found.gradient.error >= 1e-3


def test_every_wrong_update_passes_when_it_is_made_right() -> None:
    assert {case for _, case in WRONG_IDS} <= {str(case) for case in CASES}


def test_every_layout_asked_for_is_there() -> None:
    covered = {(case.layout.name, case.family) for case in CASES}
    assert {(name, family) for name, families in ASKED_FOR.items() for family in families} <= covered


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_on_at_least_three_layouts(option: str) -> None:
    assert len({case.layout.name for case in CASES if case.option == option}) >= 3


def test_the_summary_counts_what_is_within_the_tolerance(wrong: dict[tuple[str, str], Measured]) -> None:
    failed = next(iter(wrong.values()))
    assert summary([failed], failed.case.dtype) == "certificate: 0 of 1 within 2e-06"


def test_the_tool_ends_with_the_count_and_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--processes", "1", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "certificate: 2 of 2 within 2e-06"


def test_the_tool_ends_with_exit_code_1_when_a_case_fails(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[tuple[str, str], Measured]
) -> None:
    monkeypatch.setattr("tools.certify.certify_here", lambda cases, folder: list(wrong.values()))
    assert main(["--processes", "1"]) == 1
