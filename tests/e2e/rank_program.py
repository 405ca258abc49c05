"""What tests start in place of the trainer, to see ranks and their end: `-m tests.e2e.rank_program ACT FOLDER`."""

import os
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    act, folder = sys.argv[1:]
    rank = os.environ["RANK"]
    Path(folder, rank).write_text(f"{os.environ['WORLD_SIZE']} {os.environ['GLOO_SOCKET_IFNAME']}")
    if act == "is_killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if act != "ends":
        threading.Event().wait()
