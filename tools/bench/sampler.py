"""Filling a batch with vLLM on CPU: the driver of a run against plain rounds, on the quickstart's task.

    python -m tools.make_tiny_model MODEL && python -m tools.bench sampler --model MODEL

Both read the same prompts with the same seeds under the weights of the folder, in one process, taking turns step by
step. Ends with an error when they commit different batches. Nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, cast

from dapo_mcore.algo.groups import Commit, commit_in_order, passes_filter
from dapo_mcore.config import RunConfig
from dapo_mcore.desk import Desk, open_desk
from dapo_mcore.observe.quiet import quiet_libraries
from dapo_mcore.prompts import load_tokenizer
from dapo_mcore.rollout.engine import Decoder, Finished, Key, Request, Sampling
from dapo_mcore.rollout.groups import sample_groups
from dapo_mcore.train import load_config
from dapo_mcore.types import Group

if TYPE_CHECKING:
    from dapo_mcore.rollout.vllm_engine import Tokenizer

WARM_UP = 1  # steps that are not counted: vLLM's first requests take longer
SPECULATION = 1.3  # prompts a round samples per group that is still missing


@dataclass(slots=True)
class CountingEngine:
    """Counts the tokens of everything that is sampled, what is aborted included."""

    engine: Decoder
    tokens: int = 0

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def capacity(self) -> int:
        return self.engine.capacity

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self.engine.submit(requests, sampling)

    def poll(self) -> list[Finished]:
        return self._counted(self.engine.poll())

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        return self._counted(self.engine.abort(keys))

    def _counted(self, finished: list[Finished]) -> list[Finished]:
        self.tokens += sum(len(one.response.token_ids) for one in finished)
        return finished


@dataclass(slots=True)
class Contender:
    """A way to collect the groups of a step, and what it has cost."""

    name: str
    collect: Callable[[int], Sequence[Group]]  # of a step
    seconds: list[float] = field(default_factory=list)
    generated: int = 0  # tokens
    trained: int = 0

    def run(self, step: int, engine: CountingEngine) -> Sequence[Group]:
        before, started = engine.tokens, time.perf_counter()
        groups = self.collect(step)
        if step > WARM_UP:
            self.seconds.append(time.perf_counter() - started)
            self.generated += engine.tokens - before
            self.trained += sum(len(sample.response.token_ids) for group in groups for sample in group.samples)
        return groups

    def __str__(self) -> str:
        times = f"{statistics.median(self.seconds):6.2f} s  {min(self.seconds):6.2f} to {max(self.seconds):.2f} s"
        return f"{self.name:<8} {self.generated / self.trained:17.3f}  {times}"


def rounds(desk: Desk, engine: Decoder, step: int) -> list[Group]:
    """Sample some more than are missing, wait for all of them, grade, and begin again: the plainest exact way."""
    driver, source = desk.driver(engine, step), desk.source
    groups: list[Group] = []
    commit = Commit([], source.position)
    while len(commit.accepted) < driver.wanted:
        count = ceil(SPECULATION * (driver.wanted - len(commit.accepted)))
        groups += sample_groups(
            engine,
            desk.grader,
            source.peek(source.position + len(groups), count),
            driver.sampling,
            n=driver.group_size,
            seed=driver.seed,
            version=engine.version,
        )
        verdicts = {source.position + i: passes_filter(group) for i, group in enumerate(groups)}
        commit = commit_in_order(verdicts, source.position, driver.wanted)
    start = source.position
    source.commit(commit.cursor)
    return [groups[position - start] for position in commit.accepted]


def compare(desk: Desk, engine: CountingEngine, steps: int) -> list[Contender]:
    """Raises ValueError when a step's batches differ."""
    driver = Contender("driver", lambda step: desk.driver(engine, step).collect().groups)
    contenders = [Contender("rounds", partial(rounds, desk, engine)), driver]
    for step in range(1, WARM_UP + steps + 1):
        before = desk.source.state()
        committed: list[Sequence[Group]] = []
        for contender in contenders if step % 2 else reversed(contenders):
            desk.source.load_state(before)
            committed.append(tuple(contender.run(step, engine)))
        if committed[0] != committed[1]:
            raise ValueError(f"step {step}: the driver commits another batch than rounds do")
        print(f"step {step}: {len(committed[0])} groups, the same of both", flush=True)
    return contenders


def options_of(arguments: argparse.Namespace, folder: str) -> RunConfig:
    return load_config(
        [
            "experiment=quickstart",
            f"model.path={arguments.model}",
            f"trainer.output_dir={folder}",
            f"trainer.seed={arguments.seed}",
            "trainer.val_before_train=false",
            "trainer.test_freq=0",
            "actor.megatron.expert_model_parallel_size=1",
            *arguments.options,
        ]
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m tools.bench sampler")
    parser.add_argument("--model", default="outputs/quickstart/model", help="folder; tools/make_tiny_model.py makes it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", metavar="name=value", help="options of the run, as for dapo_mcore.train")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    from dapo_mcore.rollout.colocated import ColocatedEngine  # vLLM reads the environment when it is imported

    with tempfile.TemporaryDirectory() as folder:
        config = options_of(given, folder)
        tokenizer = load_tokenizer(config.model.path)
        desk = open_desk(config, tokenizer)
        with closing(desk.grader):
            data = config.data
            engine = ColocatedEngine(
                config.model,
                config.rollout,
                cast("Tokenizer", tokenizer),  # transformers leaves eos_token_id untyped
                max_prompt_length=data.max_prompt_length,
                max_response_length=data.max_response_length,
            )
            contenders = compare(desk, CountingEngine(engine), given.steps)
    print(f"{'':8} {'generated/trained':>17}  {'median time of a step':>8}, and its range")
    for contender in contenders:
        print(contender)
