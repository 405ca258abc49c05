from dapo_mcore.algo.groups import passes_filter
from dapo_mcore.rollout.engine import Request, Sampling
from dapo_mcore.rollout.fill import Fill
from dapo_mcore.rollout.pass_rate import PassRate
from dapo_mcore.rollout.pipeline import Pipeline
from dapo_mcore.types import FinishReason, Prompt, Response, Sample, Verdict
from tests.unit.rollout.scripted import ExactGrader, ScriptedEngine

RIGHT = Sample(Response((1, 2), (-0.5, -0.5), "right", FinishReason.STOP, 0), Verdict(1.0, 1.0))


def prompt(uid):
    return Prompt(uid, uid, (1,), "", "right")


def test_prompts_that_are_given_up_do_not_count_against_the_budget():
    fill = Fill(0, 1, 3, 2, 0, passes_filter, PassRate().alike(2))
    for uid in range(3):
        fill.begin(prompt(uid), rate=0.99)
    fill.record(0, 0, RIGHT)
    assert [group.prompt.uid for group in fill.give_up()] == [1, 2]
    fill.record(0, 1, RIGHT)
    assert not fill.is_determined
    assert fill.wants_more()


def test_what_was_sampled_of_a_response_survives_an_abort_before_it_is_continued():
    pipeline = Pipeline(ScriptedEngine(lambda uid, index: "no"), ExactGrader(), Sampling(1.0, 8))
    partial = Response((1, 2), (-0.5, -0.5), "cut", FinishReason.ABORTED, 0)
    pipeline.sample([Request(prompt(0), 0, 7, partial)])
    assert pipeline.abort([(0, 0)]) == {(0, 0): partial}
