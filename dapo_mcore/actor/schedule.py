"""Micro-batches through Megatron's own forward-backward schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dapo_mcore.actor.loss_head import HeadOutput
from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import Head


def finalize_known_denominator(chunks: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Sum gradients over ranks without dividing: the loss head has divided by the global number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)


def run_schedule(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], head: Head, *, forward_only: bool
) -> list[HeadOutput]:
    """Forward, and unless `forward_only` backward, of every micro-batch; one result each on the last stage, else none.

    Gradients are complete on return: summed over micro-batches and data-parallel ranks.
    """

    def step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        micro_batch = next(iterator)
        return chunk(micro_batch, head), _loss_of

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=1,  # with variable_seq_lengths the shape travels along
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _loss_of(output: HeadOutput) -> tuple[Tensor, Tensor, HeadOutput]:
    """The schedule's (sum, number of tokens, data); the number is not used, see `finalize_known_denominator`."""
    return output.loss, torch.zeros((), dtype=torch.int, device=output.loss.device), output
