"""Two engine actors in a local Ray cluster: what they sample is what one engine samples, whoever of them dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout import weight_channel
from dapo_mcore.rollout.engine import Finished, Sampling, generate
from dapo_mcore.rollout.ray_engine import EngineArguments
from dapo_mcore.rollout.ray_pool import RayPool
from dapo_mcore.types import FinishReason, Response
from tests.e2e.tiny_policies import (
    LENGTHS,
    RESPONSE_LENGTH,
    Letters,
    model_config,
    requests,
    rollout_config,
    save_policy,
    started,
    weights_in,
)

SAMPLING = Sampling(1.0, RESPONSE_LENGTH)
# More than the engines hold together, and each holds more than it decodes together: after one poll every one of them
# has requests that cannot have ended.
WANTED = requests(16, 4, length=20)
FIRST, SECOND = 1, 2  # versions
OPTIONS = RayConfig(num_engines=2, object_store_mb=80, max_replacements=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    made = {version: tmp_path_factory.mktemp(f"policy{version}") for version in (FIRST, SECOND)}
    for version, folder in made.items():
        save_policy(folder, "qwen3_moe", version)
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[int, Path]) -> dict[int, list[Response]]:
    """What one engine in this process samples."""
    with started(folders[FIRST]) as engine:
        responses = {}
        for version, folder in folders.items():
            engine.load(weights_in(folder), version)
            responses[version] = generate(engine, WANTED, SAMPLING)
    return responses


@pytest.fixture(scope="module")
def pool(folders: dict[int, Path], expected: object) -> Iterator[RayPool]:
    arguments = EngineArguments(model_config(folders[SECOND]), rollout_config(), Letters(), *LENGTHS.values(), False)
    pool = RayPool(OPTIONS, arguments)
    yield pool
    pool.close()


def processes() -> list[psutil.Process]:
    """Of the engines."""
    family = psutil.Process().children(recursive=True)
    return [process for process in family if process.name().startswith("ray::EngineAct")]


def drained(pool: RayPool, finished: list[Finished], count: int = len(WANTED)) -> list[Finished]:
    polls = 10_000  # of half a second while anything is in flight, and of no time at all when that was forgotten
    while len(finished) < count and (polls := polls - 1):
        finished += pool.poll()
    return finished


def in_order(finished: Sequence[Finished]) -> list[Response]:
    """Of all requests, each of which was answered once."""
    responses = {one.request.key: one.response for one in finished}
    assert sorted(one.request.key for one in finished) == sorted(request.key for request in WANTED)
    return [responses[request.key] for request in WANTED]


def test_two_engines_sample_what_one_does(pool, folders, expected):
    pool.load(weights_in(folders[FIRST]), FIRST)
    assert generate(pool, WANTED, SAMPLING) == expected[FIRST]
    assert pool.poll() == []


def test_an_aborted_request_is_forgotten_and_hands_back_its_beginning(pool, folders, expected):
    pool.load(weights_in(folders[FIRST]), FIRST)
    whole = {request.key: response for request, response in zip(WANTED, expected[FIRST], strict=True)}
    pool.submit(WANTED, SAMPLING)
    finished = pool.poll()
    gone = [request for request in WANTED if request.index < 2]
    partials = pool.abort({request.key for request in gone})
    for partial in partials:
        assert partial.response.finish_reason is FinishReason.ABORTED
        length = len(partial.response.token_ids)
        assert whole[partial.request.key].token_ids[:length] == partial.response.token_ids
        assert whole[partial.request.key].logprobs[:length] == partial.response.logprobs
    assert partials
    early = [one for one in finished if one.request.index < 2]
    left = drained(pool, [one for one in finished if one.request.index >= 2], len(WANTED) - len(gone))
    assert pool.poll() == []
    pool.submit([request for request in gone if request.key not in {one.request.key for one in early}], SAMPLING)
    assert in_order(drained(pool, left + early)) == expected[FIRST]


def test_an_engine_killed_in_mid_generation_changes_no_response(pool, folders, expected):
    pool.load(weights_in(folders[FIRST]), FIRST)
    pool.submit(WANTED, SAMPLING)
    finished = pool.poll()
    processes()[0].send_signal(signal.SIGKILL)
    assert in_order(drained(pool, finished)) == expected[FIRST]


def test_an_engine_killed_at_a_push_is_replaced_and_all_sample_with_the_new_weights(
    pool, folders, expected, monkeypatch
):
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights_in(folders[SECOND])
        os.kill(processes()[-1].pid, signal.SIGKILL)

    def kill_and_send(group: object, flat: torch.Tensor) -> None:
        monkeypatch.undo()
        os.kill(processes()[0].pid, signal.SIGKILL)
        weight_channel._broadcast(group, flat)

    pool.load(weights_in(folders[FIRST]), FIRST)
    pool.load(gathered(), SECOND)
    assert generate(pool, WANTED, SAMPLING) == expected[SECOND]
    monkeypatch.setattr(weight_channel, "_broadcast", kill_and_send)  # all engines have come to the meeting by then
    pool.load(weights_in(folders[FIRST]), FIRST)
    assert pool.version == FIRST
    assert len(processes()) == OPTIONS.num_engines
    assert generate(pool, WANTED, SAMPLING) == expected[FIRST]


def test_an_engine_that_hangs_is_found_and_its_requests_are_sampled_by_the_other(pool, folders, expected, monkeypatch):
    pool.load(weights_in(folders[FIRST]), FIRST)
    generate(pool, WANTED, SAMPLING)
    monkeypatch.setattr(OPTIONS, "timeout_s", 4.0)
    pool.submit(WANTED, SAMPLING)
    finished = pool.poll()
    hanging = processes()[0]
    hanging.suspend()
    try:
        assert in_order(drained(pool, finished)) == expected[FIRST]
    finally:
        hanging.kill()


def test_too_many_losses_end_the_run(pool, monkeypatch):
    monkeypatch.setattr(OPTIONS, "max_replacements", 0)
    pool.submit(WANTED, SAMPLING)
    pool.poll()
    for process in processes():
        process.kill()
    with pytest.raises(RuntimeError, match=r"rollout\.ray\.max_replacements=0"):
        drained(pool, [])
