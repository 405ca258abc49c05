"""Megatron's DDP, optimizer and learning-rate schedule. Their configs are made nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.schedule import finalize_known_denominator
from dapo_mcore.config import MegatronConfig, OptimConfig


def wrap_ddp(
    chunks: Sequence[PolicyModel], config: TransformerConfig, megatron: MegatronConfig
) -> list[DistributedDataParallel]:
    """Chunks with gradient buffers in fp32 that are summed over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        overlap_grad_reduce=megatron.overlap_grad_reduce,
        overlap_param_gather=megatron.overlap_param_gather,
    )
    config.finalize_model_grads_func = finalize_known_denominator
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if megatron.overlap_grad_reduce:  # gradients are complete in the last micro-batch only
        pauses = [ddp.no_sync for ddp in wrapped]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: TransformerConfig, megatron: MegatronConfig, optim: OptimConfig
) -> ChainedOptimizer:
    """AdamW over fp32 main parameters, copied here: the chunks' weights must be loaded before.

    Norm weights and biases are not decayed, nor those of a trained vision tower; its table of positions is.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=megatron.use_distributed_optimizer,
            overlap_param_gather=megatron.overlap_param_gather,
        ),
        list(chunks),
    )
    return cast(ChainedOptimizer, optimizer)  # one part per kind of parameters, even when there is one kind


class LearningRate:
    """Warm-up and decay in training steps, however many updates a step makes."""

    def __init__(self, optimizer: MegatronOptimizer, optim: OptimConfig, total_steps: int) -> None:
        # Step k (from 0) trains with the rate of position k + 1: the first must not have the warm-up's 0, and the
        # last must not have the decay's end.
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=optim.lr_warmup_steps,
            lr_decay_steps=max(total_steps, optim.lr_warmup_steps) + 1,
            lr_decay_style=optim.lr_decay_style,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self._optimizer, self._optim = optimizer, optim
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """The rate of training step `step`, counted from 0."""
        for group in self._optimizer.param_groups:  # a loaded optimizer brings those of the run that saved it
            group["max_lr"], group["min_lr"] = self._optim.lr, self._optim.min_lr
        self._scheduler.num_steps = 0
        self._scheduler.step(step + 1)

    @property
    def value(self) -> float:
        return max(group["lr"] for group in self._optimizer.param_groups)
