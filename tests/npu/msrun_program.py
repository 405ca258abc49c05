"""What tests run under msrun: `python -m tests.npu.msrun_program CALLER FOLDER`. A caller is a way to find one's place.

Every process that is a rank leaves FOLDER/PID.json with its place. Only `ours` is right; the others are mistakes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from dapo_mcore.launched import is_scheduler, place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def end_scheduler() -> None:
    if is_scheduler(os.environ):
        sys.exit(0)


def ours() -> None:
    end_scheduler()
    place(os.environ)
    assert "torch" not in sys.modules


def trusts_rank_id() -> None:
    end_scheduler()
    os.environ.update(RANK=os.environ["RANK_ID"], WORLD_SIZE=os.environ["RANK_SIZE"])


def scheduler_is_a_rank() -> None:
    os.environ.update(RANK=os.environ.get("MS_NODE_ID", os.environ["RANK_ID"]), WORLD_SIZE=os.environ["MS_WORKER_NUM"])


def scheduler_stays() -> None:
    if is_scheduler(os.environ):
        threading.Event().wait()
    ours()


def trusts_rank() -> None:
    """As a program made for torchrun alone."""
    end_scheduler()
    os.environ.setdefault("RANK", os.environ["MS_NODE_ID"])
    os.environ.setdefault("WORLD_SIZE", os.environ["MS_WORKER_NUM"])


def numbers_by_device() -> None:
    end_scheduler()
    os.environ.update(RANK=os.environ["DEVICE_ID"], WORLD_SIZE=os.environ["MS_WORKER_NUM"])


def is_killed() -> None:
    """Rank 1, while rank 0 waits for it."""
    ours()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def fails() -> None:
    ours()
    if os.environ["RANK"] == "1":
        sys.exit("error: a reason")
    threading.Event().wait()


MISTAKES = (trusts_rank_id, scheduler_is_a_rank, scheduler_stays, trusts_rank, numbers_by_device)
CALLERS = {call.__name__: call for call in (ours, is_killed, fails, *MISTAKES)}

if __name__ == "__main__":
    try:
        CALLERS[sys.argv[1]]()
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    Path(sys.argv[2], f"{os.getpid()}.json").write_text(json.dumps(found))
