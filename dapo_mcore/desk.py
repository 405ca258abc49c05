"""What only rank 0 has: the output folder, the prompts, the grader, and what decides with them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from dapo_mcore.algo.groups import every_group, passes_filter
from dapo_mcore.config import RunConfig
from dapo_mcore.prompts import PromptSource, build_prompts, load_image_tokens
from dapo_mcore.reward import Grader
from dapo_mcore.rollout.bank import Bank
from dapo_mcore.rollout.driver import Driver
from dapo_mcore.rollout.engine import Decoder, Sampling
from dapo_mcore.rollout.pass_rate import PassRate
from dapo_mcore.rollout.validation import Validator
from dapo_mcore.schedules import group_size_schedule, temperature_schedule
from dapo_mcore.types import Prompt

# Bytes written per byte of bf16 weights: a checkpoint holds 2 + 4 + 4 + 4 per parameter, the HF export 2 more.
DISK_PER_WEIGHT_BYTE = 8


@dataclass(frozen=True, slots=True)
class Desk:
    config: RunConfig
    source: PromptSource
    validation: Sequence[Prompt]  # empty: the run never validates
    grader: Grader
    bank: Bank
    pass_rate: PassRate = field(default_factory=PassRate)

    def driver(self, engine: Decoder, step: int) -> Driver:
        """Of a training step, with the temperature and group size it has."""
        data, rollout, group_filter = self.config.data, self.config.rollout, self.config.algorithm.filter_groups
        return Driver(
            engine=engine,
            prompts=self.source,
            grader=self.grader,
            sampling=Sampling(
                temperature_schedule(self.config)(step),
                data.max_response_length,
                rollout.top_p,
                rollout.top_k,
                routes=self.config.actor.moe.router_replay,
            ),
            group_size=group_size_schedule(self.config)(step),
            seed=self.config.trainer.seed,
            wanted=data.train_batch_size,
            budget=self.config.prompts_per_step,
            on_exhausted=group_filter.on_exhausted,
            passes=passes_filter if group_filter.enable else every_group,
            max_samples=group_filter.max_dynamic_samples,
            pass_rate=self.pass_rate,
            bank=self.bank,
        )

    def validator(self, engine: Decoder) -> Validator:
        options = self.config.rollout.val
        return Validator(
            engine=engine,
            prompts=self.validation,
            grader=self.grader,
            sampling=Sampling(options.temperature, self.config.data.max_response_length, options.top_p, options.top_k),
            n=options.n,
            greedy=options.greedy,
            seed=self.config.trainer.seed,
        )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"prompts": self.source.state(), "pass_rate": self.pass_rate.state(), "bank": self.bank.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint's state is not of these parts, or belongs to other prompts."""
        if state.keys() != self.state().keys():
            raise ValueError(
                f"trainer.resume_mode: the checkpoint has the sampling state of {', '.join(state)}, this version needs "
                f"that of {', '.join(self.state())}; go on with the version that wrote it, or start anew with "
                "trainer.resume_mode=disable"
            )
        self.source.load_state(state["prompts"])
        self.pass_rate.load_state(state["pass_rate"])
        self.bank.load_state(state["bank"])


def open_desk(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Desk:
    """Each part is refused with its reason before anything heavy is built.

    Raises:
        ValueError: the folder, the disk, the data or the verifier cannot be used.
    """
    prepare_folder(config)
    data = config.data
    vision = load_image_tokens(config.model.path, tokenizer, data.max_pixels)
    validation: Sequence[Prompt] = ()
    excluded: Collection[str] = ()
    if config.trainer.validates:
        held_out = build_prompts(data.val, data, tokenizer, "data.val", vision=vision)
        print(f"data.val: {held_out.counts}", flush=True)
        validation, excluded = held_out.prompts, held_out.questions if data.exclude_val_from_train else ()
    training = validation
    if not config.trainer.val_only:
        read = build_prompts(data.train, data, tokenizer, "data.train", excluded, vision)
        print(f"data.train: {read.counts}", flush=True)
        training = read.prompts
    grader = Grader(config.reward)
    try:
        grader.self_test(training[:4])
    except BaseException:
        grader.close()
        raise
    source = PromptSource(training, config.trainer.seed, data.shuffle)
    return Desk(config, source, validation, grader, Bank(config.rollout.staleness))


def prepare_folder(config: RunConfig) -> None:
    """Create the output folder and write the options to it.

    Raises:
        ValueError: it cannot be written to, or the disk has no room for a checkpoint and the exported model.
    """
    folder = Path(config.trainer.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ValueError(
            f"trainer.output_dir={folder}: cannot be written to ({error.strerror}); name another"
        ) from None
    if config.trainer.val_only:
        return
    weights = sum(file.stat().st_size for file in Path(config.model.path).glob("*.safetensors"))
    require_space(folder, DISK_PER_WEIGHT_BYTE * weights)


def require_space(folder: Path, needed: int) -> None:
    """Raises ValueError when the disk that holds `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"trainer.output_dir={folder}: a checkpoint and the exported model take about {needed / 1e6:,.0f} MB, "
            f"the disk has {free / 1e6:,.0f} MB left; make room or name a folder on another disk"
        )
