"""A launcher's handler of signals, and processes that listen or do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from launch.notice import HANDLED, Notice, listeners

LISTENS = "signal.signal(signal.SIGUSR1, lambda *_: print('told', flush=True))"
PROGRAM = "import signal\n{}\nprint('ready', flush=True)\nwhile True: signal.pause()"


@pytest.fixture
def child() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def start(preparation: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM.format(preparation)]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout.readline() == "ready\n"
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


@pytest.fixture
def notice() -> Iterator[Notice]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    notice = Notice(lambda number: InterruptedError(number.name))
    notice.listen()
    yield notice
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_children_that_handle_the_signal_listen(child):
    child("")
    rank = child(LISTENS)
    assert listeners(os.getpid()) == [rank.pid]
    assert listeners(rank.pid) == []


@pytest.mark.parametrize("number", HANDLED)
def test_a_rank_that_listens_is_told_and_lives_and_one_that_does_not_is_let_be(child, notice, number):
    deaf, rank = child(""), child(LISTENS)
    os.kill(os.getpid(), number)
    assert rank.stdout.readline() == "told\n"
    assert (deaf.poll(), rank.poll()) == (None, None)
    assert notice.received is number


def test_without_a_listener_the_end_comes_at_once_and_nothing_disturbs_it(child, notice):
    child("")
    with pytest.raises(InterruptedError, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.received is None


def test_a_second_sigterm_is_the_end_at_once_but_not_what_slurm_sends_after_it(child, notice):
    child(LISTENS)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(InterruptedError, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
