"""Which combinations of dynamic sampling's options cannot work."""

from __future__ import annotations

from dapo_mcore.config import OldLogprobs, OnExhausted, RolloutIs, RunConfig
from dapo_mcore.refuse import refuse

FILTER = "algorithm.filter_groups"


def check_dynamic_sampling(config: RunConfig) -> None:
    """Raises ValueError when a step could never fill its batch, or two options contradict each other."""
    filters, data = config.algorithm.filter_groups, config.data
    if config.prompts_per_step < data.train_batch_size:
        refuse(f"{FILTER}.max_num_gen_batches", filters.max_num_gen_batches,
               f"times data.gen_batch_size={data.gen_batch_size} prompts never make the data.train_batch_size="
               f"{data.train_batch_size} groups of a step", "raise one of the two")  # fmt: skip
    _check_growth(config)
    _check_staleness(config)


def _check_growth(config: RunConfig) -> None:
    filters, rollout = config.algorithm.filter_groups, config.rollout
    option, most = f"{FILTER}.max_dynamic_samples", filters.max_dynamic_samples
    size = max([rollout.n, *(stage.value for stage in rollout.n_schedule)])
    if most and not filters.enable:
        refuse(option, most, f"with {FILTER}.enable=false every group trains as it is", "give 0, or filter groups")
    if most and most <= size:
        refuse(option, most, f"a group has rollout.n={size} responses before it grows", "give more, or 0 to switch off")


def _check_staleness(config: RunConfig) -> None:
    staleness, actor = config.rollout.staleness, config.actor
    if not staleness:
        if config.algorithm.filter_groups.on_exhausted is OnExhausted.carry_over:
            refuse(f"{FILTER}.on_exhausted", "carry_over", "rollout.staleness=0 lets no group wait for a later step",
                   "set rollout.staleness=1, or on_exhausted=train_partial")  # fmt: skip
        return
    if actor.rollout_correction.rollout_is is RolloutIs.none and actor.old_logprobs is not OldLogprobs.rollout:
        refuse("rollout.staleness", staleness, "responses of earlier weights would be trained on as if sampled by the "
               "present ones", "set actor.rollout_correction.rollout_is=token, or actor.old_logprobs=rollout (then the "
               "clip is relative to the weights that sampled)")  # fmt: skip
    if actor.moe.router_replay:
        refuse("rollout.staleness", staleness, "actor.moe.router_replay=true would replay the experts that earlier "
               "weights chose", "use 0, or switch the replay off")  # fmt: skip
