"""docs/metrics.md against the metrics of every station, whatever a single run has of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from dapo_mcore.actor.routing import routing_metrics
from dapo_mcore.assemble import PHASES
from dapo_mcore.config import MoeConfig
from dapo_mcore.observe.stopwatch import Stopwatch
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Sampling
from dapo_mcore.rollout.validation import Validator
from tests.metrics_page import as_listed, listed
from tests.unit.rollout.scripted import CountedStream, ExactGrader, ScriptedEngine

SOURCE = Path(__file__).resolve().parents[2] / "dapo_mcore"
NAME = re.compile(r"(actor|rollout|reward|sampler|moe|val|weights|time|perf)/[a-z0-9_]+")


def written_out() -> Iterator[str]:
    """Names that stand in the source as they are."""
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in pieces and NAME.fullmatch(str(node.value)):
                yield str(node.value)


def put_together() -> Iterator[str]:
    """Names that are made of parts."""
    engine = ScriptedEngine(lambda uid, index: "right" if index == 0 else "no")
    stream, grader, sampling = CountedStream(), ExactGrader(), Sampling(1.0, 8)
    yield from Driver(engine, stream, grader, sampling, group_size=2, seed=0, wanted=1, budget=9).collect().metrics()
    yield from Validator(engine, stream.peek(0, 1), grader, sampling, n=2, greedy=True, seed=0).validate().metrics
    counters = {name: torch.ones(()) for name in ("aux_loss", "z_loss", "changed", "replayed")}
    every = MoeConfig(router_replay=True, seq_aux_loss_coeff=1.0, z_loss_coeff=1.0)
    yield from routing_metrics({0: {"load": torch.ones(2), **counters}}, every)
    stopwatch = Stopwatch()
    for phase in PHASES:
        stopwatch.wrap(phase, bool)()
    yield from stopwatch.lap()


def test_the_page_lists_every_metric_once_and_no_other():
    names = {as_listed(name) for name in (*written_out(), *put_together())}
    assert sorted(listed()) == sorted(names)
