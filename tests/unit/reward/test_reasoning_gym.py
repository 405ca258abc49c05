import json

import pytest
import reasoning_gym

from dapo_mcore.reward.reasoning_gym import verify


def problem(task: str, **options):
    entry = reasoning_gym.create_dataset(task, size=1, seed=3, **options)[0]
    return entry["answer"], {"task": task, "task_options": options, "entry": entry}


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "gcd"])
def test_the_gold_is_right_and_garbage_is_wrong(task):
    gold, metadata = problem(task)
    right = verify(f"6 - 3 = 3; <answer>{gold}</answer>", gold, metadata)
    wrong = verify("<answer>no idea</answer>", gold, metadata)
    assert (right.accuracy, right.score) == (1.0, 1.0)
    assert (wrong.accuracy, wrong.score) == (0.0, -1.0)


@pytest.mark.parametrize(
    "response", ["<answer>%s</answer> <answer>no</answer>", "%s", "<answer>%s", "<answer>%s!</answer>", ""]
)
def test_only_the_last_complete_tag_counts_and_all_of_it(response):
    gold, metadata = problem("gcd")
    assert verify(response.replace("%s", gold), gold, metadata).accuracy == 0.0


@pytest.mark.parametrize("task", ["countdown", "fraction_simplification", "puzzle24", "palindrome_generation"])
def test_crumbs_that_a_scorer_gives_to_garbage_or_to_nothing_are_not_right(task):
    gold, metadata = problem(task)
    scorer = reasoning_gym.create_dataset(task, size=1, seed=3)
    assert max(scorer.score_answer("zyx", metadata["entry"]), scorer.score_answer(None, metadata["entry"])) > 0
    assert verify("<answer>zyx</answer>", gold, metadata).accuracy == 0.0
    assert verify("no tag", gold, metadata).accuracy == 0.0


def test_a_task_without_a_gold_text_accepts_what_its_scorer_accepts():
    _, metadata = problem("graph_color")
    assert metadata["entry"]["answer"] is None
    colouring = metadata["entry"]["metadata"]["possible_answer"]
    same_colour = dict.fromkeys(colouring, 1)
    assert verify(f"<answer>{json.dumps(colouring)}</answer>", "", metadata).accuracy == 1.0
    assert verify(f"<answer>{json.dumps(same_colour)}</answer>", "", metadata).accuracy == 0.0


def test_options_of_the_task_reach_its_scorer():
    gold, metadata = problem("chain_sum", min_terms=4, max_terms=4, min_digits=1, max_digits=1)
    assert verify(f"<answer>{gold}</answer>", gold, metadata).accuracy == 1.0


def test_a_prompt_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="carries no task entry"):
        verify("<answer>4</answer>", "4", {"question": "2+2"})
