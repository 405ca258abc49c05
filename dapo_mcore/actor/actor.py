"""The policy that is trained: log-probabilities, updates, and the state a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from dapo_mcore.actor.build import build_chunks, read_hf_config, transformer_config
from dapo_mcore.actor.loss_head import HeadOutput, as_ratios, metric_sums, policy_loss_head
from dapo_mcore.actor.objective import Objective, make_objective
from dapo_mcore.actor.offload import Offload
from dapo_mcore.actor.optimizer import LearningRate, build_optimizer, wrap_ddp
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.routing import Routing
from dapo_mcore.actor.schedule import run_schedule
from dapo_mcore.actor.scorer import Scorer, gather_logprobs, sum_over_parts
from dapo_mcore.actor.state import load_sharded_state, sharded_state
from dapo_mcore.actor.vision.cost import image_cost
from dapo_mcore.algo.mismatch import gap_metrics
from dapo_mcore.config import ActorConfig, ModelConfig, OldLogprobs
from dapo_mcore.observe.metrics import Ratio
from dapo_mcore.platform import platform
from dapo_mcore.types import TrainBatch
from dapo_mcore.weights import hf_weights, load_hf
from dapo_mcore.weights.families import language_config


class NonFiniteUpdateError(RuntimeError):
    """Loss or gradient of an update is NaN or infinite; the weights are those from before it."""


class Actor:
    """Policy, optimizer and learning rate of this rank. Every method is collective."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        config: TransformerConfig,
        ddp_chunks: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        learning_rate: LearningRate,
        objective: Objective,
        options: ActorConfig,
    ) -> None:
        self.hf_config = hf_config
        self.transformer_config = config
        self.step = 0  # training steps done, and with it the version of the weights
        self._updates = 0  # optimizer updates made
        self._ddp_chunks = list(ddp_chunks)
        self._optimizer = optimizer
        self._learning_rate = learning_rate
        self._objective = objective
        self._options = options
        self._scorer = Scorer(
            ddp_chunks,
            config,
            language_config(hf_config).vocab_size,
            options.ppo_max_token_len_per_gpu,
            image_cost(hf_config, config, options.vision),
        )
        self._routing = Routing(self.chunks, config, options.moe)
        self._offload = Offload(ddp_chunks, optimizer, options.megatron)

    @property
    def chunks(self) -> list[PolicyModel]:
        """The bare modules of this rank, in pipeline order."""
        return [cast(PolicyModel, ddp.module) for ddp in self._ddp_chunks]

    def score(self, batch: TrainBatch, responses_per_update: int, needed: bool = False) -> TrainBatch:
        """The batch with the log-probabilities its updates clip against, as actor.old_logprobs says.

        They are recomputed in the packing of the updates, `responses_per_update` responses each, so that the ratio of
        the first update is exactly 1. `needed`: something besides the clip reads them.
        """
        skips = len(batch) <= responses_per_update and not (needed or self._objective.corrects)
        match self._options.old_logprobs:
            case OldLogprobs.rollout:
                return batch.with_old_logprobs(batch.rollout_logprobs)
            case OldLogprobs.auto if skips:
                return batch
            case _:
                return batch.with_old_logprobs(self._scorer.logprobs_of_updates(batch, responses_per_update))

    def logprobs(self, batch: TrainBatch) -> Tensor:
        """[N] float32 on the CPU, the same on every rank: log pi of every response token, masked or not."""
        return self._scorer.logprobs(batch, torch.ones_like(batch.loss_mask))

    def update(self, batch: TrainBatch) -> dict[str, Ratio]:
        """One optimizer update on the loss of `batch`; the same metrics on every rank.

        With advantages of 1, no old_logprobs and a token mean this is supervised training on the mean negative
        log-likelihood. A batch without a single trained token makes no update.

        Raises:
            NonFiniteUpdateError: before any weight changes.
        """
        whole = batch
        batch, metrics = self._objective.correct(batch)
        if batch.num_loss_tokens == 0:
            return metrics
        self._offload.resume()
        for ddp in self._ddp_chunks:
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        micro_batches = self._scorer.micro_batches(batch, batch.loss_mask)
        head = policy_loss_head(batch, self._objective)
        outputs = run_schedule(self._ddp_chunks, micro_batches, head, forward_only=False)
        metrics |= as_ratios(self._reduced_sums(outputs, list(metric_sums(batch).values())), batch)
        metrics |= self._routing.finish()
        metrics |= gap_metrics(self._own_logprobs(whole, outputs), whole.rollout_logprobs, whole.loss_mask)
        metrics["actor/grad_norm"] = Ratio(self._optimizer_step(metrics["actor/loss"].value), 1)
        metrics["actor/lr"] = Ratio(self._learning_rate.value, 1)
        dealt = self._scorer.deal(batch)
        metrics["actor/imbalance"] = Ratio(max(dealt.costs), dealt.mean_cost)
        return metrics

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy as it is now, as `weights.hf_weights` yields it."""
        self.gather_parameters()
        yield from hf_weights(self.chunks, self.hf_config)

    def rest(self) -> None:
        """Until the next update, gradients and optimizer lie where actor.megatron.{grad,optimizer}_offload say."""
        self._offload.rest()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """As `rest`, and while the block runs the weights lie where param_offload says, and nothing else is called."""
        self.gather_parameters()
        with self._offload.on_host():
            yield

    def finish_step(self) -> None:
        """A training step is complete, however many updates it made."""
        self.step += 1
        self._learning_rate.set_step(self.step)
        for chunk in self.chunks:
            chunk.forget_images()

    def state(self, loading: bool = False) -> dict[str, Any]:
        """What a checkpoint holds, as sharded tensors for megatron.core.dist_checkpointing.

        Args:
            loading: the dictionary is to be filled by `dist_checkpointing.load`, not saved.
        """
        self.gather_parameters()
        self._offload.resume()
        sharded = sharded_state(self.chunks, self._optimizer, loading)
        return {**sharded, "step": self.step, "updates": self._updates}

    def load_state(self, loaded: dict[str, Any]) -> None:
        """Continue from what `dist_checkpointing.load` made of `state(loading=True)`; the layout may differ."""
        self.step, self._updates = loaded["step"], loaded["updates"]
        self._offload.resume()
        load_sharded_state(self.chunks, self._optimizer, loaded, self._updates)
        self._learning_rate.set_step(self.step)

    def gather_parameters(self) -> None:
        """The last update's parameters everywhere: with overlap only the next forward would gather them."""
        if self._options.megatron.overlap_param_gather:
            for ddp in self._ddp_chunks:
                ddp.start_param_sync(force_sync=True)

    def _own_logprobs(self, batch: TrainBatch, outputs: Sequence[HeadOutput]) -> Tensor:
        """[N] by the trainer: from before the first update if it has computed them, otherwise those of this one."""
        if batch.old_logprobs is None or self._options.old_logprobs is OldLogprobs.rollout:
            return gather_logprobs(outputs, len(batch.loss_mask))
        return batch.old_logprobs

    def _reduced_sums(self, outputs: Sequence[HeadOutput], names: list[str]) -> dict[str, float]:
        """The sums over all micro-batches of all ranks."""
        sums = torch.zeros(len(names), dtype=torch.float64, device=platform().device)
        for output in outputs:
            sums += torch.stack([output.sums[name].double() for name in names])
        return dict(zip(names, sum_over_parts(sums).tolist(), strict=True))

    def _optimizer_step(self, loss: float) -> float:
        """Clip and step; the gradient norm before clipping."""
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteUpdateError(
                f"training step {self.step}: loss {loss}, gradient norm {grad_norm}; the update was not made. Resume "
                "from the last checkpoint with a lower actor.optim.lr, or look for the batch in the saved rollouts"
            )
        self._optimizer.step()
        self._updates += 1
        return grad_norm


def build_actor(model: ModelConfig, options: ActorConfig, total_steps: int) -> Actor:
    """The policy of `model.path` on this rank's part of the layout, ready to train.

    The process group and Megatron's groups must exist (`parallel.init_process_group`, `init_model_parallel`).

    Args:
        total_steps: training steps of the run; the end of the learning rate's decay.
    """
    hf = read_hf_config(model.path)
    config = transformer_config(hf, options.megatron, model.dtype)
    chunks = build_chunks(hf, config, options.vision)
    load_hf(chunks, model.path, hf)
    return assemble_actor(hf, config, chunks, options, total_steps)


def assemble_actor(
    hf: PretrainedConfig,
    config: TransformerConfig,
    chunks: Sequence[PolicyModel],
    options: ActorConfig,
    total_steps: int,
) -> Actor:
    """An actor around chunks whose weights are loaded."""
    ddp_chunks = wrap_ddp(chunks, config, options.megatron)
    optimizer = build_optimizer(ddp_chunks, config, options.megatron, options.optim)
    learning_rate = LearningRate(optimizer, options.optim, total_steps)
    return Actor(hf, config, ddp_chunks, optimizer, learning_rate, make_objective(options), options)
