"""The table of environment variables: value, in which processes, on which platform, under which condition, and why.

Some variables must differ between a process that trains and one that samples; a process that does both gets what both
can live with. The values for Ascend are those of its vendor's and verl's recipes. Standard library only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from launch.sites import PLATFORMS, Role, Site, may_use_every_core

PROCESS_GROUP_TIMEOUT_S = 1800  # of torch.distributed, in actor/parallel.py; a collective's own limits stay below


@dataclass(frozen=True, slots=True)
class Condition:
    text: str
    holds: Callable[[Site], bool]


@dataclass(frozen=True, slots=True)
class Variable:
    """One row. A value of None is left to the user: a lever, or an interface that nobody else knows (`is_needed`)."""

    name: str
    value: str | None  # {site.x} stands for a field of the site
    reason: str
    roles: tuple[Role, ...] = tuple(Role)
    platforms: tuple[str, ...] = PLATFORMS
    condition: Condition = Condition("", lambda site: True)
    is_needed: bool = False

    def applies(self, site: Site, role: Role) -> bool:
        return role in self.roles and site.platform in self.platforms and self.condition.holds(site)

    def value_at(self, site: Site) -> str | None:
        if self.is_needed:
            return site.interface or None
        return None if self.value is None else self.value.format(site=site)


TRAINS = (Role.trainer, Role.colocated)
SAMPLES = (Role.rollout, Role.colocated)
ALONE = (Role.trainer,)
CPU, CUDA, NPU = (("cpu",), ("cuda",), ("npu",))
SEVERAL_NODES = Condition("several nodes", lambda site: site.nodes > 1)
ONE_NODE = Condition("one node", lambda site: site.nodes == 1)
GRAPHS = Condition("engines capture graphs", lambda site: site.graphs)
EAGER = Condition("rollout.enforce_eager=true", lambda site: not site.graphs)
JEMALLOC = Condition("where installed", lambda site: bool(site.jemalloc))
ALL_CORES = Condition("every core may be used", lambda site: may_use_every_core())
EXTENSIONS = os.path.join(tempfile.gettempdir(), f"torch_extensions_{os.getuid()}")
NIC = "how the nodes reach each other: `ip -o -4 addr` names it"

TABLE = (
    # every process
    Variable("OMP_NUM_THREADS", "1", "several ranks share the cores; torch would give all of them to each"),
    Variable("TOKENIZERS_PARALLELISM", "false", "the tokenizers' threads do not survive a fork"),
    Variable("TRANSFORMERS_VERBOSITY", "error", "advice that says nothing to who runs a training"),
    Variable("HF_HUB_OFFLINE", "1", "models are folders; nothing is looked up on the network"),
    Variable("PYTHONUNBUFFERED", "1", "what a rank said before it died is in the log"),
    Variable("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "a torch_npu that cannot be loaded would end `import torch`"),
    Variable("RAY_USAGE_STATS_ENABLED", "0", "nothing is reported to anybody"),
    Variable("LD_PRELOAD", "{site.jemalloc}", "jemalloc: less host memory is lost to fragments", condition=JEMALLOC),
    # training
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron overlaps communication in the order of issue", TRAINS),
    # engines
    Variable("VLLM_ENABLE_V1_MULTIPROCESSING", "0", "an engine lives in the process that writes its weights"),
    Variable("VLLM_NO_USAGE_STATS", "1", "nothing is reported to anybody"),
    Variable("VLLM_LOGGING_LEVEL", "ERROR", "one engine per rank would say everything as often"),
    Variable("VLLM_CPU_OMP_THREADS_BIND", "nobind", "several engines share the cores of a host", platforms=CPU),
    # networks
    Variable("GLOO_SOCKET_IFNAME", "lo", "nothing leaves the machine", (Role.colocated,), condition=ONE_NODE),
    Variable("GLOO_SOCKET_IFNAME", None, NIC, condition=SEVERAL_NODES, is_needed=True),
    Variable("TP_SOCKET_IFNAME", None, NIC, TRAINS, NPU, SEVERAL_NODES, is_needed=True),
    Variable("NCCL_SOCKET_IFNAME", None, NIC, platforms=CUDA, condition=SEVERAL_NODES, is_needed=True),
    Variable("HCCL_SOCKET_IFNAME", None, NIC, platforms=NPU, condition=SEVERAL_NODES, is_needed=True),
    Variable("HCCL_CONNECT_TIMEOUT", "1200", "s; ranks load and compile for different times", platforms=NPU),
    Variable("HCCL_EXEC_TIMEOUT", "1500", "s; below the process group's, so that HCCL names the cause", platforms=NPU),
    Variable("HCCL_ASYNC_ERROR_HANDLING", "0", "errors surface in the call, not in a thread that aborts", TRAINS, NPU),
    Variable("HCCL_HOST_SOCKET_PORT_RANGE", "60000-60050", "several communicators on one device", SAMPLES, NPU),
    Variable("HCCL_NPU_SOCKET_PORT_RANGE", "61000-61050", "several communicators on one device", SAMPLES, NPU),
    Variable("HCCL_OP_EXPANSION_MODE", "AIV", "small all-reduces of decoding run on the vector cores", SAMPLES, NPU),
    # Ascend runtime
    Variable("TASK_QUEUE_ENABLE", "2", "eager training: operators are prepared by a second thread", ALONE, NPU),
    Variable("TASK_QUEUE_ENABLE", "1", "2 breaks captured graphs", SAMPLES, NPU, GRAPHS),
    Variable("TASK_QUEUE_ENABLE", "2", "eager engines: as in training", SAMPLES, NPU, EAGER),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "fewer fragments of device memory", ALONE, NPU),
    Variable("PYTORCH_NPU_ALLOC_CONF", "", "sleep mode refuses expandable segments", SAMPLES, NPU),
    Variable("VLLM_ASCEND_ENABLE_NZ", "0", "weights in a fractal format cannot be updated", SAMPLES, NPU),
    Variable("CPU_AFFINITY_CONF", "1", "a process stays near its device", platforms=NPU, condition=ALL_CORES),
    Variable("TORCH_EXTENSIONS_DIR", EXTENSIONS, "MindSpeed clears it: on no disk that nodes share", TRAINS, NPU),
    # levers
    Variable("HCCL_BUFFSIZE", None, "lever: MB of each communicator, 200 to 1024", platforms=NPU),
    Variable("P2P_HCCL_BUFFSIZE", None, "lever: MB for point-to-point groups (pipelines), 0 for none", TRAINS, NPU),
    Variable("HCCL_INTRA_ROCE_ENABLE", None, "lever: 1 for transfers between engines over RoCE", platforms=NPU),
    Variable("HCCL_DETERMINISTIC", None, "lever: true for the same sums in every run; slower", platforms=NPU),
    Variable("CLOSE_MATMUL_K_SHIFT", None, "lever: 1 for the same products in every run; slower", platforms=NPU),
    Variable("ASCEND_LAUNCH_BLOCKING", None, "lever: 1 to see which operator failed; much slower", platforms=NPU),
)  # fmt: skip
