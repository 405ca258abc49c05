"""`python -m dapo_mcore.train` on a host without NPU and CANN: the machine is there before anything else is imported.

Processes that are spawned import this program again, under another name, as they would import dapo_mcore.train.
"""

import runpy

from tests.npu.real import machine

kernels = machine.install()
runpy.run_module("dapo_mcore.train", run_name=__name__)
