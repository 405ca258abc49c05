"""`python -m launch.bound -m MODULE ARGUMENTS`: the module, in a process that ends when the one that started it does.

A launcher that is killed cannot end its ranks, and would leave them behind with the devices. Linux; standard library
only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal to get when the thread that started this process ends; exec(2) keeps it

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])
