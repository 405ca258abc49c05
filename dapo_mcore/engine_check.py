"""Refuses rollout engines and loops that do not go together."""

from __future__ import annotations

from dapo_mcore.config import Loop, PushMode, RolloutBackend, RolloutIs, RunConfig
from dapo_mcore.refuse import refuse

SMALLEST_STORE_MB = 75


def check_engines(config: RunConfig) -> None:
    """What the options say; ValueError."""
    if config.rollout.backend is RolloutBackend.ray:
        _check_ray(config)
    if config.trainer.loop is Loop.one_step_off:
        _check_overlap(config)


def _check_ray(config: RunConfig) -> None:
    options = config.rollout.ray
    for name in ("num_engines", "cpus_per_engine", "start_timeout_s", "timeout_s"):
        if getattr(options, name) <= 0:
            refuse(f"rollout.ray.{name}", getattr(options, name), "must be above 0", "give a positive number")
    if options.max_replacements < 0:
        refuse("rollout.ray.max_replacements", options.max_replacements, "must not be negative", "give 0 or more")
    if options.object_store_mb < SMALLEST_STORE_MB:
        refuse("rollout.ray.object_store_mb", options.object_store_mb, "too small for Ray",
               f"use at least {SMALLEST_STORE_MB}")  # fmt: skip
    if config.weights.push is PushMode.direct:
        refuse("weights.push", "direct", "engines of rollout.backend=ray are other processes",
               "set weights.push=auto, or rollout.backend=colocated")  # fmt: skip
    for name in ("param_offload", "grad_offload", "optimizer_offload"):
        if getattr(config.actor.megatron, name):
            refuse(f"actor.megatron.{name}", "true", "makes room for an engine that samples on the trainer's devices, "
                   "and those of rollout.backend=ray have their own", "set it to false")  # fmt: skip


def _check_overlap(config: RunConfig) -> None:
    name, loop = "trainer.loop", "one_step_off"
    if config.rollout.backend is not RolloutBackend.ray:
        refuse(name, loop, "engines of rollout.backend=colocated live on what trains and cannot sample meanwhile",
               "set rollout.backend=ray, or trainer.loop=dapo")  # fmt: skip
    if config.actor.rollout_correction.rollout_is is RolloutIs.none:
        refuse(name, loop, "trains on responses of earlier weights, and actor.rollout_correction.rollout_is=none would "
               "take them for those of the present ones", "set rollout_is=token, or trainer.loop=dapo")  # fmt: skip
    if config.actor.moe.router_replay:
        refuse(name, loop, "actor.moe.router_replay=true would replay the experts that earlier weights chose",
               "switch the replay off, or set trainer.loop=dapo")  # fmt: skip
    if config.rollout.staleness:
        refuse("rollout.staleness", config.rollout.staleness, f"counts from the engine's weights, and those of "
               f"trainer.loop={loop} are one step behind already", "set it to 0, or trainer.loop=dapo")  # fmt: skip
