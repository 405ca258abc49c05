"""The table of the certificate: layouts x families x options, and the truths they are held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dapo_mcore.config import Dtype
from tools.certificate.layouts import LAYOUTS, MOE, Layout
from tools.certificate.options import BASE, OPTION_LAYOUTS, OPTIONS
from tools.certificate.reference import Truth, tiny_model, truth

TOLERANCE = {Dtype.fp32: 2e-6, Dtype.bf16: 5e-2}  # relative


@dataclass(frozen=True)
class Case:
    layout: Layout
    family: str
    option: str
    dtype: Dtype = Dtype.fp32

    def __str__(self) -> str:
        return f"{self.layout.name} | {self.family} | {self.option}"


def all_cases(quick: bool = False) -> Iterator[Case]:
    """The base option on every layout, every other option on OPTION_LAYOUTS; `quick`: one family for each layout."""
    for layout in LAYOUTS:
        for family in layout.families[-1:] if quick else layout.families:
            yield Case(layout, family, BASE)
            if (layout.name, family) in OPTION_LAYOUTS and not quick:
                yield from (Case(layout, family, option) for option in _options(family) if option != BASE)


def cases_of(layout: Layout, dtype: Dtype, quick: bool = False) -> Iterator[Case]:
    """Every option on one layout."""
    for family in layout.families:
        yield from (Case(layout, family, option, dtype) for option in ([BASE] if quick else _options(family)))


def _options(family: str) -> list[str]:
    return [name for name, option in OPTIONS.items() if family == MOE or not option.of_experts]


def model_folder(folder: Path, case: Case) -> Path:
    return folder / "-".join([case.family, *map(str, case.layout.sizes.values())])


def write_models(cases: Iterable[Case], folder: Path) -> None:
    for case in cases:
        if not model_folder(folder, case).exists():
            tiny_model(case.family, **case.layout.sizes).save_pretrained(model_folder(folder, case))


def truth_of(case: Case) -> Truth:
    """On the weights as the case's dtype holds them."""
    option = OPTIONS[case.option]
    model = tiny_model(case.family, **case.layout.sizes)
    if case.dtype is Dtype.bf16:
        model = model.bfloat16()
    return truth(model, option.batch(), option.actor_config(), option.temperature)


def truth_file(folder: Path, case: Case) -> Path:
    return model_folder(folder, case) / f"{case.option}.pt"


def write_truths(cases: Iterable[Case], folder: Path) -> None:
    for case in cases:
        file = truth_file(folder, case)
        if not file.exists():
            torch.save(truth_of(case), file)
