"""Refuses what cannot work, before anything heavy is imported: every error names option, value, reason and way out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.config import (
    ActorConfig,
    DataConfig,
    GroupSizeStage,
    LossMode,
    MoeConfig,
    OldLogprobs,
    OptimConfig,
    ResumeMode,
    RolloutConfig,
    RolloutIs,
    RolloutRs,
    RunConfig,
    SourceConfig,
    TemperatureStage,
)
from dapo_mcore.engine_check import check_engines
from dapo_mcore.layout_check import check_model_fits, check_world
from dapo_mcore.refuse import refuse
from dapo_mcore.sampling_check import check_dynamic_sampling
from dapo_mcore.vision_check import check_no_tower, check_vision, decoder_of, sees

DECAY_STYLES = ("constant", "linear", "cosine")


def check(config: RunConfig, world_size: int) -> None:
    """Everything that can be known from the options, the world size and the model's config.json.

    Raises:
        ValueError: a value is out of range, or two options contradict each other.
    """
    _refuse_nan(config)
    _check_ranges(config)
    _check_optim(config.actor.optim)
    if not config.trainer.val_only:
        _check_source("data.train", config.data.train)
    if config.trainer.validates:
        _check_source("data.val", config.data.val)
    _check_batches(config.data, config.rollout, config.actor)
    _check_sampling(config.rollout)
    check_dynamic_sampling(config)
    check_engines(config)
    _check_algorithm(config)
    _check_kl(config)
    _check_correction(config.actor)
    _check_resume(config)
    check_world(config.actor.megatron, config.rollout, world_size)
    check_model(config, read_model_config(config.model.path))


def read_model_config(path: str) -> dict[str, Any]:
    """The model folder's config.json."""
    file = Path(path) / "config.json"
    if not file.is_file():
        refuse(
            "model.path",
            path,
            f"{file} does not exist",
            "give a folder with an HF config.json, safetensors and tokenizer",
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        refuse("model.path", path, f"{file} is not JSON ({error})", "download or export the model again")


def check_model(config: RunConfig, model: Mapping[str, Any]) -> None:
    """The layout must fit the model: `model` is its config.json."""
    if sees(model):
        check_vision(config.model.path, config.actor.megatron, model)
    else:
        check_no_tower(config.actor.vision, model)
    decoder = decoder_of(model)
    _check_routers(config.actor.moe, decoder)
    check_model_fits(config.actor.megatron, config.rollout, decoder)
    longest = config.data.max_prompt_length + config.data.max_response_length
    limit = decoder.get("max_position_embeddings")
    if limit and longest > limit:
        refuse("data.max_prompt_length + data.max_response_length", longest,
               f"above the model's max_position_embeddings {limit}", "shorten one of the two")  # fmt: skip


def _check_routers(moe: MoeConfig, model: Mapping[str, Any]) -> None:
    losses = {"actor.moe.seq_aux_loss_coeff": moe.seq_aux_loss_coeff, "actor.moe.z_loss_coeff": moe.z_loss_coeff}
    for option, coefficient in losses.items():
        if coefficient < 0:
            refuse(option, coefficient, "would reward what the loss is there to prevent", "use 0 or more")
    has_experts = bool(model.get("num_experts") or model.get("num_local_experts"))
    for option, value in {"actor.moe.router_replay": moe.router_replay, **losses}.items():
        if value and not has_experts:
            refuse(option, value, f"{model.get('model_type')} has no experts, and so no router", "leave it out")


def _refuse_nan(options: Any, prefix: str = "") -> None:
    """Of a dataclass of options: no comparison below would notice one."""
    for option in fields(options):
        name, value = prefix + option.name, getattr(options, option.name)
        if is_dataclass(value):
            _refuse_nan(value, f"{name}.")
        elif isinstance(value, float) and math.isnan(value):
            refuse(name, value, "is not a number", "give one")


def _check_ranges(config: RunConfig) -> None:
    data, rollout, actor, trainer = config.data, config.rollout, config.actor, config.trainer
    positive = {
        "data.max_prompt_length": data.max_prompt_length,
        "data.max_response_length": data.max_response_length,
        "data.max_pixels": data.max_pixels,
        "data.train_batch_size": data.train_batch_size,
        "rollout.kv_cache_mb": rollout.kv_cache_mb,
        "rollout.max_num_seqs": rollout.max_num_seqs,
        "rollout.max_num_batched_tokens": rollout.max_num_batched_tokens,
        "rollout.tensor_model_parallel_size": rollout.tensor_model_parallel_size,
        "rollout.val.n": rollout.val.n,
        "reward.num_workers": config.reward.num_workers,
        "reward.timeout_s": config.reward.timeout_s,
        "algorithm.filter_groups.max_num_gen_batches": config.algorithm.filter_groups.max_num_gen_batches,
        "actor.ppo_mini_batch_size": actor.ppo_mini_batch_size,
        "actor.ppo_max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu,
        "actor.loss_scale_factor": actor.loss_scale_factor,
        "actor.optim.clip_grad": actor.optim.clip_grad,
        "actor.optim.eps": actor.optim.eps,
        "actor.megatron.tensor_model_parallel_size": actor.megatron.tensor_model_parallel_size,
        "actor.megatron.pipeline_model_parallel_size": actor.megatron.pipeline_model_parallel_size,
        "actor.megatron.virtual_pipeline_model_parallel_size": actor.megatron.virtual_pipeline_model_parallel_size,
        "actor.megatron.context_parallel_size": actor.megatron.context_parallel_size,
        "actor.megatron.expert_model_parallel_size": actor.megatron.expert_model_parallel_size,
        "actor.megatron.expert_tensor_parallel_size": actor.megatron.expert_tensor_parallel_size,
        "weights.bucket_mb": config.weights.bucket_mb,
        "weights.max_probe_gap": config.weights.max_probe_gap,
        "trainer.total_training_steps": trainer.total_training_steps,
        "trainer.max_ckpt_to_keep": trainer.max_ckpt_to_keep,
    }
    not_negative = {
        "data.gen_batch_size": data.gen_batch_size,
        "rollout.staleness": rollout.staleness,
        "actor.clip_ratio_low": actor.clip_ratio_low,
        "actor.clip_ratio_high": actor.clip_ratio_high,
        "actor.optim.lr": actor.optim.lr,
        "actor.optim.min_lr": actor.optim.min_lr,
        "actor.optim.lr_warmup_steps": actor.optim.lr_warmup_steps,
        "actor.optim.weight_decay": actor.optim.weight_decay,
        "rollout.val.temperature": rollout.val.temperature,
        "trainer.test_freq": trainer.test_freq,
        "trainer.save_freq": trainer.save_freq,
        "trainer.rollouts_to_keep": trainer.rollouts_to_keep,
    }
    for option, value in positive.items():
        if value <= 0:
            refuse(option, value, "must be above 0", "give a positive number")
    for option, value in not_negative.items():
        if value < 0:
            refuse(option, value, "must not be negative", "give 0 or more")


def _check_optim(optim: OptimConfig) -> None:
    if optim.lr_decay_style not in DECAY_STYLES:
        refuse("actor.optim.lr_decay_style", optim.lr_decay_style, "unknown", f"use one of {DECAY_STYLES}")
    if optim.min_lr > optim.lr:
        refuse("actor.optim.min_lr", optim.min_lr, f"above actor.optim.lr={optim.lr}, which decays to it", "lower it")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            refuse(f"actor.optim.{name}", getattr(optim, name), "weighs what came before", "use a value in [0, 1)")


def _check_source(name: str, source: SourceConfig) -> None:
    if bool(source.files) == bool(source.task):
        refuse(f"{name}.files", source.files, f"{name}.task={source.task!r}: exactly one of the two names the problems",
               f"set {name}.files=[a.jsonl] or {name}.task=chain_sum")  # fmt: skip
    if source.task and source.size <= 0:
        refuse(
            f"{name}.size", source.size, "a reasoning-gym task has no size of its own", "say how many problems to draw"
        )
    for file in source.files:
        if not Path(file).is_file():
            refuse(f"{name}.files", file, "no such file", "correct the path")
        if Path(file).suffix not in (".jsonl", ".parquet"):
            refuse(f"{name}.files", file, "neither .jsonl nor .parquet", "convert the file")


def _check_batches(data: DataConfig, rollout: RolloutConfig, actor: ActorConfig) -> None:
    if rollout.n < 2:
        refuse("rollout.n", rollout.n, "an advantage is relative to the other responses of its group", "use at least 2")
    if actor.ppo_mini_batch_size > data.train_batch_size:
        refuse("actor.ppo_mini_batch_size", actor.ppo_mini_batch_size,
               f"above data.train_batch_size={data.train_batch_size}: both count prompts", "lower it")  # fmt: skip
    if data.train_batch_size % actor.ppo_mini_batch_size:
        refuse("actor.ppo_mini_batch_size", actor.ppo_mini_batch_size,
               f"does not divide data.train_batch_size={data.train_batch_size}", "use a divisor")  # fmt: skip


def _check_schedule(option: str, stages: Sequence[TemperatureStage] | Sequence[GroupSizeStage], least: float) -> None:
    ends = [stage.until for stage in stages]
    if ends != sorted(set(ends)) or any(not 0 < until <= 1 for until in ends):
        refuse(option, [f"until {until}" for until in ends], "the ends of stages are shares of the training",
               "give rising values in (0, 1]; after the last stage the option itself holds")  # fmt: skip
    for stage in stages:
        if stage.value < least:
            refuse(option, stage.value, "cannot be sampled and learned from", f"use at least {least}")


def _check_sampling(rollout: RolloutConfig) -> None:
    _check_schedule("rollout.n_schedule", rollout.n_schedule, 2)
    _check_schedule("rollout.temperature_schedule", rollout.temperature_schedule, 0.01)
    if rollout.temperature <= 0:
        refuse("rollout.temperature", rollout.temperature, "greedy responses of a group are all equal", "use 1.0")
    if rollout.top_p != 1.0 or rollout.top_k != -1:
        refuse("rollout.top_p", rollout.top_p, f"rollout.top_k={rollout.top_k}: training needs the probability of each "
               "token among all tokens", "use top_p=1.0 and top_k=-1 (rollout.val has its own)")  # fmt: skip
    if not 0 < rollout.val.top_p <= 1:
        refuse("rollout.val.top_p", rollout.val.top_p, "a share of probability", "use a value in (0, 1]")
    if rollout.val.top_k < -1:
        refuse("rollout.val.top_k", rollout.val.top_k, "a number of tokens to draw from", "use -1 for all of them")
    tokens, sequences = rollout.max_num_batched_tokens, rollout.max_num_seqs
    if tokens < sequences:
        reason = f"below rollout.max_num_seqs={sequences}, each of which samples one in a step"
        refuse("rollout.max_num_batched_tokens", tokens, reason, "raise it, or lower max_num_seqs")


def _check_algorithm(config: RunConfig) -> None:
    buffer, length = config.reward.overlong_buffer, config.data.max_response_length
    if buffer.enable and not 0 < buffer.len <= length:
        refuse("reward.overlong_buffer.len", buffer.len, f"must lie in (0, data.max_response_length={length}]",
               "shorten the buffer or set reward.overlong_buffer.enable=false")  # fmt: skip
    if buffer.penalty_factor < 0:
        refuse("reward.overlong_buffer.penalty_factor", buffer.penalty_factor, "would reward length", "use 0 or more")
    if config.algorithm.std_ddof not in (0, 1):
        refuse(
            "algorithm.std_ddof", config.algorithm.std_ddof, "degrees of freedom", "use 1 (unbiased) or 0 (population)"
        )
    if config.actor.clip_ratio_low >= 1:
        refuse(
            "actor.clip_ratio_low", config.actor.clip_ratio_low, "1 - clip_ratio_low must be positive", "use e.g. 0.2"
        )
    if config.actor.clip_ratio_c <= 1:
        refuse("actor.clip_ratio_c", config.actor.clip_ratio_c, "a dual clip bounds the ratio from above, beyond 1",
               "use e.g. 10.0, or a very large number to switch it off")  # fmt: skip
    if not 0 <= config.reward.max_failure_rate <= 1:
        refuse("reward.max_failure_rate", config.reward.max_failure_rate, "a share", "use a value in [0, 1]")


def _check_kl(config: RunConfig) -> None:
    actor, algorithm = config.actor, config.algorithm
    for switch, on, option, coefficient in (
        ("actor.use_kl_loss", actor.use_kl_loss, "actor.kl_loss_coef", actor.kl_loss_coef),
        ("algorithm.use_kl_in_reward", algorithm.use_kl_in_reward, "algorithm.kl_ctrl.kl_coef",
         algorithm.kl_ctrl.kl_coef),
    ):  # fmt: skip
        if coefficient < 0:
            refuse(option, coefficient, "would reward distance from the reference model", "use 0 or more")
        if coefficient and not on:
            refuse(option, coefficient, f"without a reference model, as {switch}=false", f"set {switch}=true, or 0")
        if on and not coefficient:
            refuse(switch, True, f"{option}=0 gives the reference model no effect", f"set {option}, or {switch}=false")
    if algorithm.use_kl_in_reward and algorithm.overlong_filtering:
        refuse("algorithm.use_kl_in_reward", True, "algorithm.overlong_filtering=true leaves truncated responses "
               "without log-probabilities, but their rewards count in the group", "switch one of both off")  # fmt: skip
    if config.ref.param_offload and not config.needs_reference:
        refuse("ref.param_offload", True, "no option needs a reference model",
               "set actor.use_kl_loss or algorithm.use_kl_in_reward, or ref.param_offload=false")  # fmt: skip


def _check_correction(actor: ActorConfig) -> None:
    correction, name = actor.rollout_correction, "actor.rollout_correction"
    weights, rejects = correction.rollout_is is not RolloutIs.none, correction.rollout_rs is not RolloutRs.none
    if (weights or rejects) and actor.old_logprobs is OldLogprobs.rollout:
        refuse("actor.old_logprobs", "rollout", f"{name} corrects the gap between the trainer's log-probabilities and "
               "the engine's, which must both be there", "set actor.old_logprobs=auto")  # fmt: skip
    for option, level in (("rollout_is", correction.rollout_is), ("rollout_rs", correction.rollout_rs)):
        if actor.loss_mode is LossMode.gspo and level in (RolloutIs.token, RolloutRs.token_k1):
            refuse(f"{name}.{option}", level.name, "actor.loss_mode=gspo has one ratio per response, and weights or "
                   "masks of single tokens would take it apart", "use a sequence level")  # fmt: skip
    bounds = {
        "rollout_is_threshold": (correction.rollout_is_threshold_lower, correction.rollout_is_threshold),
        "rollout_rs_threshold": (correction.rollout_rs_threshold_lower, correction.rollout_rs_threshold),
    }
    for option, (lower, upper) in bounds.items():
        if upper < 1:
            refuse(f"{name}.{option}", upper, "would cut tokens on which engine and trainer agree", "use e.g. 2.0")
        if not 0 <= lower <= 1:
            refuse(f"{name}.{option}_lower", lower, "a lower bound of a ratio around 1", "use a value in [0, 1]")


def _check_resume(config: RunConfig) -> None:
    path, mode = config.trainer.resume_from_path, config.trainer.resume_mode
    if mode is ResumeMode.resume_path and not (path and Path(path).is_dir()):
        refuse("trainer.resume_from_path", path, "no such folder", "name a checkpoint folder, or use resume_mode=auto")
    latest = Path(config.trainer.output_dir) / "checkpoints" / "latest"
    goes_back = latest.parent.resolve() in Path(path).resolve().parents
    if mode is ResumeMode.resume_path and latest.is_file() and not goes_back:
        refuse(
            "trainer.resume_from_path",
            path,
            f"trainer.output_dir has {latest.read_text()} of its own, whose progress would be lost",
            "go on with trainer.resume_mode=auto and without resume_from_path, or name another output_dir",
        )
    if mode is not ResumeMode.resume_path and path:
        refuse(
            "trainer.resume_mode",
            mode.name,
            f"trainer.resume_from_path={path} would be ignored",
            "set resume_mode=resume_path",
        )
