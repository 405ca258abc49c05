import pytest
import reasoning_gym

from dapo_mcore.reward import VerifierError


@pytest.fixture
def prompt(item):
    return lambda answer, **metadata: item("", answer, **metadata)[0]


def task_prompts(prompt, task):
    data = reasoning_gym.create_dataset(task, size=2, seed=1)
    return [prompt(entry["answer"] or "", task=task, task_options={}, entry=entry) for entry in data]


@pytest.mark.parametrize("verifier", ["math", "geometry", "exact_match"])
def test_built_in_verifiers_pass(grader, prompt, verifier):
    grader(verifier).self_test([prompt("72"), prompt("18")])


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "gcd", "countdown", "figlet_font"])
def test_tasks_with_a_usable_scorer_pass(grader, prompt, task):
    grader("reasoning_gym").self_test(task_prompts(prompt, task))


def test_a_task_that_calls_every_answer_right_is_refused(grader, prompt):
    with pytest.raises(VerifierError, match="was judged right"):
        grader("reasoning_gym").self_test(task_prompts(prompt, "game_of_life_halting"))


def test_a_scorer_that_raises_on_garbage_is_refused(grader, prompt):
    with pytest.raises(VerifierError, match="got no verdict"):
        grader("reasoning_gym").self_test(task_prompts(prompt, "prime_factorization"))


def test_prompts_of_files_are_not_for_the_reasoning_gym_verifier(grader, prompt):
    with pytest.raises(VerifierError, match="carries no task entry"):
        grader("reasoning_gym").self_test([prompt("4")])


def test_gold_answers_that_the_verifier_never_accepts_are_refused(grader, prompt):
    whole_solution = r"He has \boxed{2}, then \boxed{3}. \boxed{"
    with pytest.raises(VerifierError, match=r"none of 2 gold answers .* data.train.answer_pattern"):
        grader("math").self_test([prompt(whole_solution), prompt(whole_solution)])


def test_one_odd_gold_answer_among_others_is_not_refused(grader, prompt):
    grader("math").self_test([prompt(r"\boxed{2}, \boxed{"), prompt("72")])


def test_a_users_function_that_raises_on_every_gold_answer_is_refused(grader, prompt):
    with pytest.raises(VerifierError, match="KeyError: '72'"):
        grader("hostile_verifiers:raise_on_everything").self_test([prompt("72")])


def test_a_users_function_that_returns_nonsense_is_refused(grader, prompt):
    with pytest.raises(VerifierError, match=r"returned 'yes': return a bool"):
        grader("hostile_verifiers:obey").self_test([prompt("text")])


def test_a_users_function_that_hangs_is_refused(grader, prompt):
    with pytest.raises(VerifierError, match=r"reward.timeout_s=0.5"):
        grader("hostile_verifiers:obey", timeout_s=0.5).self_test([prompt("wait")])
