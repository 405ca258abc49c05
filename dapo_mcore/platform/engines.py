"""What vLLM's backend for a device asks of those who use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _refuse_nothing() -> None:
    """Every environment will do."""


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """Of rollout engines on one kind of device."""

    sleep_level: int  # of vLLM's sleep mode between samplings; 0: engines keep their memory and do not sleep
    private_layout: str = ""  # why nobody but vLLM's loader may write to the weights; empty if the layout is known
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of vLLM's engine
    environment: Mapping[str, str] = field(default_factory=dict)  # set before vLLM is imported, whatever was there
    refuse_environment: Callable[[], None] = _refuse_nothing  # ValueError: the process cannot hold an engine
