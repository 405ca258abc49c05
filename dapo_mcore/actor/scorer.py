"""Log-probabilities of responses under this rank's part of a model; the model may train elsewhere, or never."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dapo_mcore.actor.balance import Deal, deal, sequence_cost
from dapo_mcore.actor.loss_head import HeadOutput, logprob_head
from dapo_mcore.actor.packing import Cut, MicroBatch, pack
from dapo_mcore.actor.schedule import run_schedule
from dapo_mcore.platform import platform
from dapo_mcore.types import TrainBatch, VisualSpan


class Scorer:
    """Packs batches for this rank and runs them forward. Every method is collective."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: TransformerConfig,
        vocab_size: int,
        max_token_len: int,
        image_cost: Callable[[VisualSpan], float] | None = None,
    ) -> None:
        """`max_token_len` is the token budget of a micro-batch; `image_cost` that of `vision.cost`, None: nothing."""
        self._chunks = list(chunks)
        self._config = config
        self._vocab_size = vocab_size
        self._max_token_len = max_token_len
        self._image_cost = image_cost

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch, wanted: Tensor) -> Tensor:
        """[N] float32 on the CPU, the same on every rank: log pi where `wanted`, 0 elsewhere."""
        head = logprob_head(batch.temperature)
        outputs = run_schedule(self._chunks, self.micro_batches(batch, wanted), head, forward_only=True)
        return gather_logprobs(outputs, len(wanted))

    def logprobs_of_updates(self, batch: TrainBatch, responses_per_update: int) -> Tensor:
        """[N] as `logprobs` of the trained tokens, packed as the updates of `responses_per_update` responses will be.

        The same numbers then come out of the same arithmetic: a policy that has not moved has a ratio of exactly 1.
        """
        parts = batch.split(responses_per_update)
        return torch.cat([self.logprobs(part, part.loss_mask) for part in parts])

    def micro_batches(self, batch: TrainBatch, wanted: Tensor) -> list[MicroBatch]:
        """This rank's; their number is the same on every rank."""
        if len(batch) and int(batch.prompt_lengths.min()) < 1:
            raise ValueError("a prompt of no tokens: nothing predicts the response's first token; drop such prompts")
        mine = self.deal(batch).shares[parallel_state.get_data_parallel_rank()]
        return [pack(batch, sequences, wanted, self._cut, platform().device) for sequences in mine]

    def deal(self, batch: TrainBatch) -> Deal:
        """Which responses run where; the same on every rank."""
        config = self._config
        interleaved = config.virtual_pipeline_model_parallel_size is not None
        lengths = batch.prompt_lengths + batch.response_lengths
        return deal(
            (lengths + -lengths % self._cut.sequence_multiple).tolist(),
            parallel_state.get_data_parallel_world_size(),
            self._max_token_len * config.context_parallel_size,
            sequence_cost(config, self._vocab_size),
            multiple=config.pipeline_model_parallel_size if interleaved else 1,
            images=self._image_costs(batch),
        )

    def _image_costs(self, batch: TrainBatch) -> list[float] | None:
        if self._image_cost is None or batch.visuals is None:
            return None
        return [sum(self._image_cost(visual.span) for visual in shown) for shown in batch.visuals]

    @property
    def _cut(self) -> Cut:
        config = self._config
        return Cut(
            context_size=config.context_parallel_size,
            context_rank=parallel_state.get_context_parallel_rank(),
            sequence_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        )


def gather_logprobs(outputs: Sequence[HeadOutput], total: int) -> Tensor:
    """[total] float32 on the CPU of every rank: what the micro-batches of all ranks found, 0 elsewhere."""
    logprobs = torch.zeros(total, device=platform().device)
    for output in outputs:
        logprobs[output.tokens.to(logprobs.device)] = output.logprobs
    return sum_over_parts(logprobs).cpu()


def sum_over_parts(values: Tensor) -> Tensor:
    """Sum in place over the ranks that hold different tokens, and hand the result to all pipeline stages.

    Only the last stage has seen tokens: the others bring zeros.
    """
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
