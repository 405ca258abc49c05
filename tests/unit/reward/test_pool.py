import signal
import threading
from pathlib import Path

import psutil
import pytest

from dapo_mcore.config import RewardConfig
from dapo_mcore.reward import Grader, GradingError, VerifierError
from dapo_mcore.types import Outcome

TOLERANT = {"max_failure_rate": 1.0}
IMPATIENT = {"timeout_s": 2.0, **TOLERANT}


def graded(grader, item, *responses):
    return grader.grade([item(response) for response in responses])


def test_verdicts_come_in_the_order_of_the_items(grader, item):
    pool = grader("exact_match", num_workers=2)
    items = [item(f"<answer>{i % 3}</answer>", answer="1") for i in range(50)]
    assert [v.accuracy for v in pool.grade(items)] == [float(i % 3 == 1) for i in range(50)]
    assert pool.grade([]) == []


def test_the_signal_that_asks_a_run_to_end_leaves_its_verifiers_at_work(grader, item):
    before = psutil.Process().children()
    pool = grader("exact_match", num_workers=1, timeout_s=58.0)  # no other test shares its worker
    pool.grade([item("<answer>1</answer>", answer="1")])
    (worker,) = set(psutil.Process().children()) - set(before)
    worker.send_signal(signal.SIGUSR1)
    assert [v.accuracy for v in pool.grade([item("<answer>1</answer>", answer="1")])] == [1.0]
    assert worker in psutil.Process().children()


def test_verifiers_that_never_end_are_killed_and_the_pool_stays_as_large(grader, item):
    pool = grader(num_workers=3, timeout_s=2.0, **TOLERANT)
    verdicts = graded(pool, item, "wait", "right", "spin", "hold the lock", "wrong")
    late, fine = Outcome.TIMEOUT, Outcome.GRADED
    assert [v.outcome for v in verdicts] == [late, fine, late, late, fine]
    assert [v.accuracy for v in verdicts] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert "reward.timeout_s=2" in verdicts[0].detail
    assert pool.num_workers == 3
    assert [v.accuracy for v in graded(pool, item, "right", "right", "right", "right")] == [1.0] * 4


def test_responses_are_graded_while_others_come_in_and_a_slow_one_holds_none_up(grader, item):
    pool = grader(num_workers=2, timeout_s=59.0)  # no other test shares the worker that hangs
    for index, response in enumerate(["wait", "right", "wrong"]):
        pool.submit((0, index), *item(response))
    verdicts = dict(pool.poll(wait=True))
    while len(verdicts) < 2:
        verdicts |= pool.poll(wait=True)
    assert {key: verdict.accuracy for key, verdict in verdicts.items()} == {(0, 1): 1.0, (0, 2): 0.0}
    assert pool.poll(wait=False) == []
    pool.abort({(0, 0)})
    assert pool.poll(wait=True) == []  # nothing is outstanding


def test_the_verdict_on_an_aborted_response_is_not_taken_for_that_of_its_successor(grader, item):
    pool = grader(num_workers=1)
    pool.submit((0, 0), *item("right"))
    pool.submit((0, 1), *item("right"))
    pool.abort({(0, 0), (0, 1)})
    pool.submit((0, 0), *item("wrong"))
    ((key, verdict),) = pool.poll(wait=True)
    assert (key, verdict.accuracy) == ((0, 0), 0.0)
    assert pool.poll(wait=True) == []


@pytest.mark.parametrize(
    ("action", "detail"),
    [
        ("segfault", "SIGSEGV"),
        ("abort", "SIGABRT"),
        ("exit", "exit code 3"),
        ("sys.exit", "exit code 5"),
        ("memory", "MemoryError"),
        ("recursion", "RecursionError"),
        ("raise", "RuntimeError: no luck today (hostile_verifiers.py:"),
        ("text", "returned 'yes'"),
        ("scribble", "channel"),
        ("close", "channel"),
    ],
)
def test_a_verifier_that_breaks_is_an_error_with_its_reason_never_a_wrong_answer(grader, item, action, detail):
    pool = grader(**TOLERANT)
    before, broken, after = graded(pool, item, "right", action, "wrong")
    assert (before.outcome, before.accuracy) == (Outcome.GRADED, 1.0)
    assert broken.outcome is Outcome.ERROR
    assert detail in broken.detail
    assert (after.outcome, after.accuracy) == (Outcome.GRADED, 0.0)
    assert pool.num_workers == 1


def test_a_verifier_may_print_without_end(grader, item):
    (verdict,) = graded(grader(), item, "print")
    assert verdict.accuracy == 1.0


def test_grading_from_a_thread_gives_the_same_verdicts(grader, item):
    pool, verdicts = grader("math", **IMPATIENT), []
    items = [item(r"\boxed{\frac{84}{2}}"), item(r"\boxed{43}")]
    thread = threading.Thread(target=lambda: verdicts.extend(pool.grade(items)))
    thread.start()
    thread.join()
    assert verdicts == pool.grade(items)
    assert [v.score for v in verdicts] == [1.0, -1.0]


def test_a_power_tower_is_a_wrong_answer_and_no_timeout(grader, item):
    pool = grader("math", **IMPATIENT)
    verdicts = pool.grade([item(r"\boxed{9^{9^{9^9}}}"), item(r"\boxed{42}")])
    assert [(v.outcome, v.accuracy) for v in verdicts] == [(Outcome.GRADED, 0.0), (Outcome.GRADED, 1.0)]


def test_long_texts_and_large_metadata_reach_the_verifier(grader, item):
    pool = grader("exact_match")
    (verdict,) = pool.grade([item("x" * 5_000_000 + "<answer>42</answer>", padding="y" * 5_000_000)])
    assert verdict.accuracy == 1.0


def test_workers_import_nothing_heavy(grader, item):
    pool = grader("hostile_verifiers:read_other_module")
    modules = ["json", "torch", "numpy", "omegaconf", "megatron", "vllm", "transformers"]
    assert [v.accuracy for v in graded(pool, item, *modules)] == [1.0, *[0.0] * 6]


@pytest.fixture
def fussy(monkeypatch):
    """A pool of its own, without earlier failures."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with Grader(RewardConfig(verifier="hostile_verifiers:obey", timeout_s=60.0, max_failure_rate=0.1)) as pool:
        yield pool


def test_too_many_failures_end_the_run_with_the_first_reason(fussy, item):
    with pytest.raises(GradingError, match=r"3 of the last 20 .*\(0 timeouts, 3 errors\).*no luck today") as error:
        graded(fussy, item, *["right"] * 17, *["raise"] * 3)
    assert "reward.max_failure_rate=0.1" in str(error.value)


def test_few_failures_are_counted_not_fatal_but_add_up_over_calls(fussy, item):
    verdicts = graded(fussy, item, *["right"] * 18, *["raise"] * 2)
    assert sum(v.outcome is Outcome.ERROR for v in verdicts) == 2
    with pytest.raises(GradingError, match="3 of the last 21"):
        graded(fussy, item, "raise")


def test_one_failure_in_a_small_call_is_no_rate(fussy, item):
    assert [v.outcome for v in graded(fussy, item, "raise", "right", "raise")].count(Outcome.ERROR) == 2
    with pytest.raises(GradingError, match="3 of the last 4"):
        graded(fussy, item, "raise")


def test_no_failure_is_tolerated_at_rate_zero(grader, item):
    with pytest.raises(GradingError, match="1 of the last 3"):
        graded(grader(max_failure_rate=0.0), item, "right", "raise", "right")


@pytest.mark.parametrize(
    ("verifier", "reason"),
    [
        ("maths", "no such verifier; use one of math, geometry, geometry_accuracy, reasoning_gym, exact_match"),
        ("hostile_verifierz:obey", "cannot import hostile_verifierz"),
        ("hostile_verifiers:obay", "has no 'obay'"),
        ("hostile_verifiers:not_a_function", "not a function but of type int"),
    ],
)
def test_a_verifier_that_does_not_exist_is_refused_by_the_self_test(monkeypatch, verifier, reason):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(VerifierError) as error, Grader(RewardConfig(verifier=verifier)) as pool:
        pool.self_test()
    assert f"reward.verifier={verifier}: " in str(error.value)
    assert reason in str(error.value)


def test_a_closed_pool_has_no_processes_and_no_files():
    this = psutil.Process()
    children, files = set(this.children()), this.num_fds()
    with Grader(RewardConfig(verifier="exact_match", num_workers=2)) as pool:
        assert pool.num_workers == 2
    assert pool.num_workers == 0
    assert set(this.children()) <= children
    assert this.num_fds() <= files
    pool.close()  # again
