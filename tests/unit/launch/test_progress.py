"""The progress display and the children it follows."""

import io
import os
import sys
from pathlib import Path

import pytest

from launch.progress import Stage, StageFailed, run


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def python(tmp_path: Path, program: str, **callbacks) -> Path:
    log = tmp_path / "logs" / "child.log"
    run([sys.executable, "-c", program], log=log, cwd=tmp_path, **callbacks)
    return log


def test_without_a_terminal_a_stage_speaks_at_every_tenth_only():
    out, clock = io.StringIO(), Clock()
    stage = Stage("train", out=out, clock=clock)
    for step in range(41):
        stage.update(step, 40, f"step {step}")
    assert out.getvalue().splitlines()[0] == "train ..."
    assert [line.split()[-1] for line in out.getvalue().splitlines()[1:]] == [str(step) for step in range(0, 41, 4)]
    assert "\r" not in out.getvalue()


def test_without_a_terminal_a_quiet_stage_speaks_every_20_seconds():
    out, clock = io.StringIO(), Clock()
    stage = Stage("train", out=out, clock=clock)
    for second in range(60):
        clock.now = 100.0 + second
        stage.update(note="validating")
    assert [line.split()[1] for line in out.getvalue().splitlines()[1:]] == ["20", "40"]


def test_on_a_terminal_one_line_is_drawn_over_and_over_and_closed_with_the_time():
    out, clock = Terminal(), Clock()
    stage = Stage("install", out=out, clock=clock)
    stage.update(5, 10, "half of it")
    clock.now += 61
    stage.close("140 packages")
    assert "█" * 12 + "░" * 12 in out.getvalue()
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().endswith("\r\x1b[Kinstall      140 packages  (61 s)\n")


def test_lines_of_the_child_arrive_whole_and_in_order_and_stay_in_the_log(tmp_path):
    lines = []
    program = "import sys; [sys.stdout.write(part) or sys.stdout.flush() for part in ('a', 'b\\nc', 'd\\n', 'e\\n')]"
    log = python(tmp_path, program, on_line=lines.append)
    assert lines[-3:] == ["ab", "cd", "e"]
    assert log.read_text().endswith("ab\ncd\ne\n")


def test_the_log_of_an_earlier_attempt_is_kept_and_not_reported_again(tmp_path):
    python(tmp_path, "print('first')")
    lines = []
    log = python(tmp_path, "print('second')", on_line=lines.append)
    assert "first" not in lines
    assert lines[-1] == "second"
    assert "first" in log.read_text()


def test_a_failing_child_is_told_with_the_end_of_its_output_the_code_and_the_log(tmp_path):
    with pytest.raises(StageFailed) as failed:
        python(tmp_path, "import sys\nfor n in range(100): print(n, flush=True)\nsys.exit('no space')")
    message = str(failed.value)
    assert "  | no space" in message
    assert "  | 99\n" in message
    assert "  | 10\n" not in message
    assert "exit code 1" in message
    assert str(tmp_path / "logs" / "child.log") in message


def test_an_interruption_ends_the_child_and_what_it_started(tmp_path):
    # The grandchild holds a named pipe open: its reader meets the end of file once nobody is left.
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    grandchild = "import time; held = open('alive', 'w'); print('ready', flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"

    def interrupt_when_ready(line: str) -> None:
        if line == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        python(tmp_path, program, on_line=interrupt_when_ready)
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_child_sees_the_environment_it_is_given_and_no_input(tmp_path):
    program = "import os, sys; print(os.environ['GIVEN'], repr(sys.stdin.read()))"
    assert python(tmp_path, program, env={"GIVEN": "yes"}).read_text().endswith("yes ''\n")
