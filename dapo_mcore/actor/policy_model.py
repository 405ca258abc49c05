"""Megatron's GPTModel that hands hidden states and the head's weight to a loss head instead of making logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from dapo_mcore.actor.packing import MicroBatch


@dataclass(frozen=True, slots=True)
class HeadInput:
    """What a loss head works on, on one rank of the last pipeline stage.

    A head must return the gradient of `hidden` that comes from its own columns alone: the model sums over the group.
    """

    hidden: Tensor  # [R, H]: the rows that predict the wanted tokens, equal on all ranks of the group
    weight: Tensor  # [V_padded / tp, H]: this rank's rows of the head
    vocab_start: int  # vocabulary id of the first of them
    vocab_size: int  # real ids; columns from here on are padding and no part of the softmax
    group: dist.ProcessGroup | None  # the tensor parallel ranks; None: this one alone


Head = Callable[[MicroBatch, HeadInput], Any]


class PolicyModel(GPTModel):
    """One pipeline chunk of the policy.

    Returns the head's result on the last stage, hidden states elsewhere.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self._call: tuple[MicroBatch, Head] | None = None

    def forward(self, micro_batch: MicroBatch, head: Head) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._call = (micro_batch, head)  # GPTModel.forward would not hand them on to _postprocess
        return super().forward(**self._inputs(micro_batch))

    def forget_images(self) -> None:
        """A step is over: what was kept of its images goes. A policy of text keeps nothing."""

    def _inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Of GPTModel's forward."""
        return {
            "input_ids": micro_batch.input_ids,
            "position_ids": None,  # rope counts from the limits of the packed sequences
            "attention_mask": None,
            "packed_seq_params": micro_batch.packed,
        }

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.post_process:
            return hidden_states
        assert self._call is not None
        (micro_batch, head), self._call = self._call, None
        group: Any = parallel_state.get_tensor_model_parallel_group()
        weight = self._head_weight()
        return head(
            micro_batch,
            HeadInput(
                hidden=self._predicting_rows(hidden_states, micro_batch.rows),
                weight=weight,
                vocab_start=group.rank() * weight.shape[0],
                vocab_size=self.real_vocab_size,
                group=group if group.size() > 1 else None,
            ),
        )

    def _head_weight(self) -> Any:
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.shared_embedding_or_output_weight()
        layer = self.output_layer
        for wait in layer._forward_pre_hooks.values():  # for its overlapped gather; nothing calls the layer itself
            wait(layer, ())
        return layer.weight

    def _predicting_rows(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """[s, 1, H], under sequence parallelism [s / tp, 1, H] -> [R, H]; the backward sums over the group."""
        if self.config.sequence_parallel:
            whole = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
            return whole.squeeze(1)[rows]
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states.squeeze(1)[rows])
