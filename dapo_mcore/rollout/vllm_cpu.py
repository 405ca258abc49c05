"""What vLLM's CPU backend (0.32) needs from outside to hold changing weights and to run in parallel.

Each mend answers one fault of vLLM and can go when the fault does. None of them applies to an accelerator.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from torch import nn


def mend(job: str) -> None:
    """Install the mends of vLLM's classes. A second engine in the process changes nothing but the job's name.

    Args:
        job: shared by the ranks of this run and used by no other run on the host.
    """
    send_experts_to_their_owners()
    _name_shared_memory_after(job)


@functools.cache  # applied twice it would take local experts for global ones
def send_experts_to_their_owners() -> None:
    """The CPU experts ignore `expert_map`: with expert parallelism a global expert number indexes past the local
    weights (segmentation fault). Other ranks' experts run here as local expert 0 with weight 0; the all-reduce that
    follows adds the owners' parts.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def apply_local(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs).arguments
        if (expert_map := call["expert_map"]) is not None:
            local = expert_map[call["topk_ids"].long()]  # -1: another rank's
            call["topk_weights"] = call["topk_weights"] * (local >= 0)
            call["topk_ids"] = local.clamp(min=0).to(call["topk_ids"].dtype)
        apply(**call)

    CPUUnquantizedExperts.apply = apply_local  # type: ignore[method-assign]


def _name_shared_memory_after(job: str) -> None:
    """Under a launcher every job names its shared-memory segments alike: a second job on the host, or one after a
    crash, fails with EEXIST.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name = _CPUSHMDistributed.make_group_name

    def name_of_job(communicator: Any) -> str:
        return f"{job}-{name(communicator)}".replace("/", "_")

    _CPUSHMDistributed.make_group_name = staticmethod(name_of_job)  # type: ignore[method-assign]


def unname_shared_memory() -> None:
    """A process that is killed leaves its shared-memory segment behind. One that has lost its name, which nobody needs
    once all ranks have mapped it, goes with the last of them.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    start = _CPUSHMDistributed.__init__

    def start_and_unname(self: Any, communicator: Any) -> None:
        start(self, communicator)  # ends with a barrier
        Path(f"/dev/shm/{self.group_name}_{communicator.rank}").unlink()

    _CPUSHMDistributed.__init__ = start_and_unname  # type: ignore[method-assign]


def before_reload(model: nn.Module) -> None:
    """The fused experts take a present kernel for 'weights are packed' and keep what they packed first: without it
    they pack again.
    """
    for module in _with_method(model, "UnquantizedFusedMoEMethod"):
        module.quant_method.moe_kernel = None  # type: ignore[union-attr]


def after_reload(model: nn.Module) -> None:
    """A tied head receives no weights of its own and would go on multiplying with the packed old embedding."""
    for module in _with_method(model, "UnquantizedEmbeddingMethod"):
        module.quant_method.process_weights_after_loading(module)  # type: ignore[operator,union-attr]


def packing(layer: nn.Module) -> str:
    """The class of vLLM's that multiplies with a layer's packed weights; for a linear layer packed otherwise than by
    oneDNN, the function that does. Processors with AMX, ZenDNN or Arm kernels pack otherwise, and some convert biases.
    """
    if (kernel := getattr(layer.quant_method, "moe_kernel", None)) is not None:
        experts = kernel.fused_experts
        return "zentorch" if experts._use_zentorch else type(experts).__name__
    multiply: Any = getattr(layer, "cpu_linear", None)
    held = [type(cell.cell_contents).__name__ for cell in getattr(multiply, "__closure__", None) or ()]
    return held[0] if len(held) == 1 else getattr(multiply, "__qualname__", "nothing")


def _with_method(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(getattr(module, "quant_method", None)).__name__ == name]
