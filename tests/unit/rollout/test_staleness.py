"""What a step sampled ahead, and later steps do with it when rollout.staleness lets them."""

from dataclasses import dataclass, replace

import pytest

from dapo_mcore.config import OnExhausted
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Finished, Sampling
from dapo_mcore.types import FinishReason
from tests.unit.rollout.scripted import CountedStream, ExactGrader, ScriptedEngine


@dataclass
class InterruptibleEngine(ScriptedEngine):
    """Has sampled two tokens of whatever is aborted."""

    def abort(self, keys):
        cut = []
        for request in [request for request in self._waiting if request.key in keys]:
            text = self.answer(request.prompt.uid, request.index)
            whole = self._response(text)
            partial = replace(
                whole,
                token_ids=whole.token_ids[:2],
                logprobs=whole.logprobs[:2],
                finish_reason=FinishReason.ABORTED,
            )
            cut.append(Finished(request, partial))
        super().abort(keys)
        return cut


def driver_of(fails=(), engine=ScriptedEngine, **options):
    """Prompts pass, but for those in `fails`."""

    def answer(uid, index):
        return "right" if index == 0 and uid not in fails else "no"

    defaults = {"group_size": 2, "seed": 7, "wanted": 4, "budget": 100, "bank": Bank(staleness=1)}
    return Driver(
        engine(answer, capacity=options.pop("capacity", 64)), CountedStream(), ExactGrader(),
        Sampling(1.0, 8), **{**defaults, **options},
    )  # fmt: skip


def step(driver, version):
    """The committed (uid, version of its first response), and how many requests that took."""
    driver.engine.version = version
    before = len(driver.engine.requests)
    groups = driver.collect().groups
    return [(g.prompt.uid, g.samples[0].response.version) for g in groups], len(driver.engine.requests) - before


def test_groups_sampled_ahead_commit_first_with_the_version_that_sampled_them():
    driver = driver_of(capacity=6)  # two polls sample prompts 0 to 5
    first, taken = step(driver, 0)
    assert first == [(uid, 0) for uid in range(4)]
    assert taken == 2 * 7
    second, _ = step(driver, 1)
    assert second == [(4, 0), (5, 0), (6, 1), (7, 1)]
    assert driver.prompts.position == 8


def test_without_staleness_they_are_sampled_again():
    driver = driver_of(bank=Bank(staleness=0))
    step(driver, 0)
    assert step(driver, 1)[0] == [(uid, 1) for uid in range(4, 8)]


def test_groups_that_are_too_old_are_sampled_again():
    driver = driver_of()
    step(driver, 0)
    assert driver.bank.num_groups > 0
    assert step(driver, 2)[0] == [(uid, 2) for uid in range(4, 8)]


def test_rejected_groups_of_the_bank_are_not_sampled_again_either():
    driver = driver_of(fails={4, 5})
    _, taken = step(driver, 0)
    second, _ = step(driver, 1)
    assert [uid for uid, _ in second] == [6, 7, 8, 9]
    assert not {4, 5} & {q.prompt.uid for q in driver.engine.requests[taken:]}


def test_an_interrupted_response_is_continued_with_another_seed():
    driver = driver_of(engine=InterruptibleEngine, capacity=9)
    step(driver, 0)
    cut = {key: banked.response for key, banked in driver.bank.entries.items() if banked.is_cut}
    assert cut
    seeds = {q.key: q.seed for q in driver.engine.requests}
    before = len(driver.engine.requests)
    step(driver, 1)
    again = {q.key: q for q in driver.engine.requests[before:]}
    for key, partial in cut.items():
        assert again[key].partial == partial
        assert again[key].seed != seeds[key]
    assert all(q.partial is None for key, q in again.items() if key not in cut)


def test_what_passed_in_a_step_that_is_carried_over_trains_with_the_next():
    driver = driver_of(fails={1, 2, 4, 5}, budget=4, on_exhausted=OnExhausted.carry_over)
    assert step(driver, 0) == ([], 8)
    assert driver.prompts.position == 0
    second, taken = step(driver, 1)
    assert second == [(0, 0), (3, 0), (6, 1), (7, 1)]
    assert taken == 8  # prompts 4 to 7: the first four cost nothing
    assert driver.prompts.position == 8


def test_what_can_wait_no_longer_trains_alone():
    driver = driver_of(fails=set(range(1, 100)), budget=4, on_exhausted=OnExhausted.carry_over)
    assert step(driver, 0)[0] == []
    assert step(driver, 1)[0] == [(0, 0)]
    assert driver.prompts.position == 8


@pytest.mark.parametrize("version", [1, 2])
def test_the_bank_of_a_resumed_run_is_that_of_the_checkpoint(version):
    driver = driver_of()
    step(driver, 0)
    resumed = driver_of(bank=Bank(staleness=1))
    resumed.bank.load_state(driver.bank.state())
    resumed.prompts.commit(driver.prompts.position)
    assert step(resumed, version)[0] == step(driver, version)[0]
