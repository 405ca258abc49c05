"""The table of the certificate: layouts x families x options, and the truths they are held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.config import ActorConfig, Dtype, MoeConfig
from dapo_mcore.types import TrainBatch
from tools.certificate.layouts import LAYOUTS, OF_EXPERTS, SEEING, Layout
from tools.certificate.options import BASE, OPTION_CASES, OPTION_LAYOUTS, OPTIONS
from tools.certificate.reference import Truth, save_model, tiny_model, truth

TOLERANCE = {Dtype.fp32: 2e-6, Dtype.bf16: 5e-2}  # relative


@dataclass(frozen=True)
class Case:
    layout: Layout
    family: str
    option: str
    dtype: Dtype = Dtype.fp32

    def __str__(self) -> str:
        return f"{self.layout.name} | {self.family} | {self.option}"

    def actor_config(self, **settings: Any) -> ActorConfig:
        """In bf16 without clips and with given experts: what a rounded number may decide proves nothing there."""
        if self.dtype is Dtype.bf16:
            settings |= {"clip_ratio_low": 0.999, "clip_ratio_high": 1e6, "clip_ratio_c": 1e6}
            settings |= {"moe": MoeConfig(router_replay=True)} if self.family in OF_EXPERTS else {}
        return OPTIONS[self.option].actor_config(**settings)

    def batch(self) -> TrainBatch:
        return OPTIONS[self.option].batch(self.family in SEEING)


def all_cases(quick: bool = False) -> Iterator[Case]:
    """The base option on every layout, others as tools/certificate/options.py says; `quick`: one case a layout."""
    for layout in LAYOUTS:
        for family in layout.families[-1:] if quick else layout.families:
            for option in [BASE] if quick else _options(family):
                at = layout.name, family
                if option == BASE or at in OPTION_LAYOUTS or (*at, option) in OPTION_CASES:
                    yield Case(layout, family, option)


def cases_of(layout: Layout, dtype: Dtype, quick: bool = False) -> Iterator[Case]:
    """Every option on one layout."""
    for family in layout.families:
        yield from (Case(layout, family, option, dtype) for option in ([BASE] if quick else _options(family, dtype)))


def _options(family: str, dtype: Dtype = Dtype.fp32) -> list[str]:
    """The losses of routers count the experts these would choose themselves, which bf16 may change."""
    of_experts = family in OF_EXPERTS and dtype is Dtype.fp32
    fit = {name: option for name, option in OPTIONS.items() if of_experts or not option.of_experts}
    return [name for name, option in fit.items() if family in SEEING or not option.of_images]


def model_folder(folder: Path, case: Case) -> Path:
    return folder / "-".join([case.family, *map(str, case.layout.sizes.values())])


def write_models(cases: Iterable[Case], folder: Path) -> None:
    for case in cases:
        if not model_folder(folder, case).exists():
            save_model(tiny_model(case.family, **case.layout.sizes), model_folder(folder, case))


def truth_of(case: Case) -> Truth:
    """On the weights as the case's dtype holds them."""
    option = OPTIONS[case.option]
    model = tiny_model(case.family, **case.layout.sizes)
    if case.dtype is Dtype.bf16:
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
    return truth(model, case.batch(), case.actor_config(), option.temperature)


def truth_file(folder: Path, case: Case) -> Path:
    return model_folder(folder, case) / f"{case.option}.pt"


def write_truths(cases: Iterable[Case], folder: Path) -> None:
    for case in cases:
        file = truth_file(folder, case)
        if not file.exists():
            torch.save(truth_of(case), file)
