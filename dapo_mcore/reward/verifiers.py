"""Verifiers by name. A verifier is a function of the response's text, the gold answer and the prompt's metadata."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dapo_mcore.reward.custom import load_function
from dapo_mcore.reward.errors import VerifierError
from dapo_mcore.types import Verdict

Verifier = Callable[[str, str, Mapping[str, Any]], Verdict]

BUILT_IN = {  # name -> module below dapo_mcore.reward, function
    "math": ("math", "verify"),
    "geometry": ("geometry", "verify"),
    "geometry_accuracy": ("geometry", "verify_accuracy"),
    "reasoning_gym": ("reasoning_gym", "verify"),
    "exact_match": ("exact_match", "verify"),
}


def load_verifier(name: str) -> Verifier:
    """
    Raises:
        VerifierError: `name` is neither built in nor an importable `package.module:function`.
    """
    if name in BUILT_IN:
        module, function = BUILT_IN[name]
        return getattr(importlib.import_module(f"dapo_mcore.reward.{module}"), function)
    if ":" in name:
        return load_function(name)
    raise VerifierError(
        f"reward.verifier={name}: no such verifier; use one of {', '.join(BUILT_IN)}, or package.module:function"
    )
