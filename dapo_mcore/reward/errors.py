"""Why grading ends a run."""

from __future__ import annotations


class VerifierError(ValueError):
    """The verifier cannot be used at all."""


class GradingError(RuntimeError):
    """Too many responses could not be graded."""
