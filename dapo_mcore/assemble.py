"""Builds the parts of a run from its options, what fails cheaply first, and wires them to the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dapo_mcore.actor import parallel
from dapo_mcore.actor.actor import Actor, build_actor
from dapo_mcore.actor.reference import Reference, build_reference
from dapo_mcore.batch import make_batch, shuffle, with_kl_in_rewards
from dapo_mcore.checkpoint.store import CheckpointStore
from dapo_mcore.config import ResumeMode, RunConfig
from dapo_mcore.dapo import Run
from dapo_mcore.desk import Desk, open_desk
from dapo_mcore.end_of_step import EndOfStep
from dapo_mcore.handover import Handover
from dapo_mcore.interruption import Interruption
from dapo_mcore.observe.loggers import Sink, console_sink, fan_out, jsonl_sink, tensorboard_sink, wandb_sink
from dapo_mcore.observe.stopwatch import Stopwatch
from dapo_mcore.orders import ORDERS
from dapo_mcore.platform import platform
from dapo_mcore.prompts import load_tokenizer, pixels_under
from dapo_mcore.roll_call import call_the_roll
from dapo_mcore.rollout.build import rollout_engine
from dapo_mcore.rollout.engine import RolloutEngine
from dapo_mcore.rollout.leader import is_leader, lead
from dapo_mcore.rollout.validation import Validation
from dapo_mcore.schedules import group_size_schedule, temperature_schedule
from dapo_mcore.turns import Turns
from dapo_mcore.types import Group, TrainBatch
from dapo_mcore.weights import save_hf

PHASES = ("push", "rollout", "old_logprobs", "update", "validate", "save")


@contextmanager
def assembled(config: RunConfig) -> Iterator[tuple[Callable[[], None], EndOfStep]]:
    """The loop of a run, ready to train, and what surrounds it; closed again when the block ends. Collective."""
    if config.actor.megatron.deterministic_mode:
        platform().make_deterministic()
    parallel.init_process_group()
    call_the_roll(config)
    tokenizer = load_tokenizer(config.model.path)
    desk = _desk_of_leader(config, tokenizer)
    try:
        parallel.init_model_parallel(config.actor.megatron, config.trainer.seed)
        policy = build_actor(config.model, config.actor, config.trainer.total_training_steps)
        checkpoints = CheckpointStore(Path(config.trainer.output_dir) / "checkpoints", config.trainer.max_ckpt_to_keep)
        _resume(config, checkpoints, policy, desk)
        reference = (
            build_reference(config.model, config.actor, config.ref, policy.chunks) if config.needs_reference else None
        )
        with ExitStack() as ending:
            with policy.on_host():
                engine = ending.enter_context(rollout_engine(config, tokenizer))
                engine.sleep()
            yield _connect(config, policy, reference, engine, checkpoints, desk)
    finally:
        if desk is not None:
            desk.grader.close()


def _desk_of_leader(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Desk | None:
    """Rank 0's desk, None elsewhere; what it refuses ends every rank. Collective."""
    opened: list[Desk] = []
    lead(lambda: opened.append(open_desk(config, tokenizer)))
    return opened[0] if opened else None


def _resume(config: RunConfig, checkpoints: CheckpointStore, policy: Actor, desk: Desk | None) -> None:
    """Continue from a checkpoint if trainer.resume_mode says so and there is one. Collective."""
    find: dict[ResumeMode, Callable[[], Path | None]] = {
        ResumeMode.disable: lambda: None,
        ResumeMode.resume_path: lambda: Path(config.trainer.resume_from_path),
        ResumeMode.auto: lambda: checkpoints.newest(partial(print, flush=True)),
    }
    found = find[config.trainer.resume_mode]()
    if found is None:
        return
    run_state = checkpoints.load(found, policy)
    if not config.trainer.val_only:  # which may have other prompts
        lead(desk and partial(desk.load_state, run_state))
    if is_leader():
        print(f"resumed from {found}: {policy.step} steps done", flush=True)


Stage = Callable[[TrainBatch, int], TrainBatch]  # batch, responses per update -> batch


def scoring(config: RunConfig, policy: Actor, reference: Reference | None) -> Stage:
    """What every batch goes through between sampling and its first update; an empty one has none."""
    in_reward = config.algorithm.use_kl_in_reward
    stages: list[Stage] = [partial(policy.score, needed=in_reward)]
    if reference is not None:
        stages.append(reference.score)
    if in_reward:
        stages.append(lambda batch, _: with_kl_in_rewards(batch, config.algorithm))
    return lambda batch, count: reduce(lambda scored, stage: stage(scored, count), stages if len(batch) else (), batch)


def _connect(
    config: RunConfig,
    policy: Actor,
    reference: Reference | None,
    engine: RolloutEngine,
    checkpoints: CheckpointStore,
    desk: Desk | None,
) -> tuple[Callable[[], None], EndOfStep]:
    """Each call of the loop is timed as a phase; what rank 0 decides is led."""
    stopwatch, turns = Stopwatch(), Turns(policy, engine)
    order = ORDERS[config.trainer.loop](config, engine, desk, turns)
    temperature, group_size = temperature_schedule(config), group_size_schedule(config)
    pixels_of = pixels_under(config.model.path, config.data.max_pixels)

    def responses_per_update(step: int) -> int:
        return config.actor.ppo_mini_batch_size * group_size(step)

    def push_weights() -> None:
        order.end_sampling()
        order.make_room()
        handover.push()

    def batch_of(groups: Sequence[Group], step: int) -> TrainBatch:
        batch = make_batch(groups, config.algorithm, config.reward, config.data, pixels_of)
        return shuffle(replace(batch, temperature=temperature(step)), config.trainer.seed, step)

    def validate() -> Validation:
        return lead(desk and desk.validator(engine).validate, engine, Validation.without_groups)

    def score(batch: TrainBatch, step: int) -> TrainBatch:
        return scored(batch, responses_per_update(step))

    def export(folder: Path) -> None:
        save_hf(policy.weights(), policy.hf_config, config.model.path, folder)

    scored = scoring(config, policy, reference)
    handover = Handover(config, policy, engine)
    push = stopwatch.wrap("push", push_weights)
    end = EndOfStep(
        options=config.trainer,
        policy=policy,
        push_weights=push,
        push_metrics=handover.metrics,
        validate=stopwatch.wrap("validate", turns.of_engine(validate)),
        run_state=order.run_state,
        end_sampling=order.end_sampling,
        interruption=Interruption(),
        checkpoints=checkpoints,
        export=export,
        log=_build_log(config, policy.step) if is_leader() else _keep_silent,
        stopwatch=stopwatch,
        peak_memory=lambda: platform().memory_stats().peak,
        folder=Path(config.trainer.output_dir),
    )
    run = Run(
        first_step=policy.step + 1,
        last_step=config.trainer.total_training_steps,
        responses_per_update=responses_per_update,
        push_weights=push,
        collect_groups=stopwatch.wrap("rollout", order.collect_groups),
        make_batch=batch_of,
        with_old_logprobs=stopwatch.wrap("old_logprobs", score),
        update=stopwatch.wrap("update", policy.update),
        finish_step=end.finish,
    )
    return partial(order.train, run), end


def _build_log(config: RunConfig, steps_done: int) -> Sink:
    """The run's sinks on rank 0, which write anew what comes after the steps done; before the first also step 0.

    Validation alone adds a row to those that are there.
    """
    folder, first = Path(config.trainer.output_dir), steps_done + 1 if steps_done else 0
    if config.trainer.val_only:
        first = sys.maxsize
    sinks = [
        console_sink(config.trainer.total_training_steps, PHASES),
        jsonl_sink(folder, first),
        tensorboard_sink(folder, first),
    ]
    options: dict[str, Any] = asdict(config)
    return fan_out(sinks + ([wandb_sink(config, options, first)] if config.trainer.wandb else []))


def _keep_silent(step: int, row: object) -> None:
    """The log of every rank but the first."""
