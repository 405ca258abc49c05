"""Everything the CPU adapter changes. Checked against megatron-core 0.16.1 and 0.19.2 without Transformer Engine."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.platform.megatron_cpu import torch_proxy
from dapo_mcore.platform.megatron_cpu.hook import PROXY, TENSOR, Patch


def rng_state_of_cpu(module: Any) -> None:
    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state
    # CudaRNGStatesTracker.fork warns that the CPU generator moved, which is the one it forks here.
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def no_jit_fuser(module: Any) -> None:
    module.disable_jit_fuser()


def uneven_gather_and_reduce_scatter(module: Any) -> None:
    even_gather, even_reduce_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(
        x: Tensor, group: dist.ProcessGroup, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        whole = x.new_empty(sum(sizes), *x.shape[1:])
        to_everyone = x.contiguous().repeat(group.size(), *[1] * (x.dim() - 1))
        dist.all_to_all_single(whole, to_everyone, sizes, [x.shape[0]] * group.size(), group=group)
        return whole

    def reduce_scatter(
        x: Tensor, group: dist.ProcessGroup, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_reduce_scatter(x, group, input_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        mine = sizes[group.rank()]
        summands = x.new_empty(group.size() * mine, *x.shape[1:])
        dist.all_to_all_single(summands, x.contiguous(), [mine] * group.size(), sizes, group=group)
        return summands.unflatten(0, (group.size(), mine)).sum(0)

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather, reduce_scatter


def split_sizes_as_numpy(module: Any) -> None:
    of_gpu_tensors = module.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, *args: Any, **kwargs: Any) -> Any:
        moved = of_gpu_tensors(tensor, as_numpy, *args, **kwargs)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    module.maybe_move_tensor_to_cpu = move


def router_without_te(module: Any) -> None:
    vars(module).setdefault("te_general_gemm", None)


def recompute_without_te(module: Any) -> None:
    if module.HAVE_TE:
        return

    class NoFP8:
        @staticmethod
        def is_fp8_enabled() -> bool:
            return False

        @staticmethod
        def get_fp8_recipe() -> None:
            return None

    module.FP8GlobalStateManager = NoFP8
    module.activation_recompute_forward = lambda *args, **kwargs: contextlib.nullcontext()
    module.fp8_autocast = lambda *args, **kwargs: contextlib.nullcontext()


def adam_state_before_first_step(module: Any) -> None:
    if module.HAVE_APEX_OR_TE:
        return
    stepped_state_dict = module.DistributedOptimizer.state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            state = self.optimizer.state[parameter]
            if "step" not in state:
                zeros = torch.zeros_like(parameter.data)
                state.update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
        return stepped_state_dict(self)

    module.DistributedOptimizer.state_dict = state_dict


def adam_step_survives_loading(module: Any) -> None:
    if module.HAVE_APEX_OR_TE:
        return
    set_all = module.DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][index]
        restored_step = self.optimizer.state[main_param]["step"]  # load_state_dict took it from the parameter groups
        with torch.no_grad():  # fp32 main parameters are views of leaf parameters
            set_all(self, model_param, {**tensors, "step": restored_step})

    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def adam_step_per_parameter(module: Any) -> None:
    if module.HAVE_APEX_OR_TE:
        return
    load_shared = module.DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load_shared(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    module.DistributedOptimizer.load_state_dict = load_state_dict


def norm_under_sequence_parallel(module: Any) -> None:
    build = module.WrappedTorchNorm

    class TorchNorm:
        def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
            plain = copy.copy(config)
            plain.sequence_parallel = False
            norm = build(plain, *args, **kwargs).to(config.params_dtype)
            for parameter in norm.parameters():  # finalize_model_grads sums marked gradients over TP
                parameter.sequence_parallel = config.sequence_parallel
            return norm

    module.WrappedTorchNorm = TorchNorm


def causal_core_attention(module: Any) -> None:
    from dapo_mcore.platform.megatron_cpu.core_attention import CausalCoreAttention  # imports megatron.core

    module.LocalSpecProvider.core_attention = lambda self: CausalCoreAttention


_RANDOM = "megatron.core.tensor_parallel.random"
_MOE_UTILS = "megatron.core.transformer.moe.moe_utils"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"

PATCHES = (
    # Megatron-Core takes a CUDA device for granted.
    Patch("device-calls", PROXY, "layers ask for the current CUDA device", torch_proxy.device_calls),
    Patch("streams", PROXY, "the MoE dispatcher makes CUDA streams", torch_proxy.streams),
    Patch("generator", PROXY, "seeding goes to the CUDA generator", torch_proxy.generator),
    Patch("rng-state", _RANDOM, "RNG streams are states of the CUDA generator", rng_state_of_cpu),
    Patch("factories", PROXY, 'optimizer and buffers are made with device="cuda"', torch_proxy.factories),
    Patch("tensor-type", TENSOR, "the optimizer compares type() with torch.cuda.*", torch_proxy.tensor_type),
    Patch("tensor-cuda", TENSOR, "tied embeddings under PP call .cuda()", torch_proxy.tensor_cuda),
    Patch("no-jit", "megatron.core.jit", "small functions would start torch.compile", no_jit_fuser),
    Patch(
        "uneven-collectives",
        "megatron.core.tensor_parallel.mappings",
        "gloo refuses the unequal sizes of ETP with EP",
        uneven_gather_and_reduce_scatter,
    ),
    Patch("split-sizes", _MOE_UTILS, "only tensors on a GPU become the lists all-to-all needs", split_sizes_as_numpy),
    # Faults of Megatron-Core without Transformer Engine and Apex.
    Patch("router-gemm", _MOE_UTILS, "0.16: NameError te_general_gemm in every MoE forward", router_without_te),
    Patch("recompute-fp8", _RANDOM, "NameError in recompute of norms and MoE activations", recompute_without_te),
    Patch(
        "adam-unstepped",
        _DISTRIBUTED_OPTIMIZER,
        "an optimizer that never stepped can be neither saved nor loaded into",
        adam_state_before_first_step,
    ),
    Patch("adam-step-key", _DISTRIBUTED_OPTIMIZER, "KeyError step on load", adam_step_survives_loading),
    Patch(
        "adam-shared-step",
        _DISTRIBUTED_OPTIMIZER,
        "after a load all parameters share one step tensor, which AdamW advances once per parameter: silently wrong",
        adam_step_per_parameter,
    ),
    # Missing from the local layer spec.
    Patch(
        "norm-sequence-parallel",
        "megatron.core.transformer.torch_norm",
        "torch norms refuse sequence parallelism and ignore params_dtype",
        norm_under_sequence_parallel,
    ),
    Patch(
        "core-attention",
        "megatron.core.models.backends",
        "the local attention refuses packed sequences and context parallelism",
        causal_core_attention,
    ),
)
