"""What the simulated policy answers: how long each response is and whether it is right.

A prompt's chance p of a right response is drawn from Beta(a, a), with `a` such that a group of G responses passes the
filter with the pass rate asked for: the lower it is, the more prompts are always solved or never. Length is log-normal
around a mean that falls with p, from about 1 + HARDNESS to 1 - HARDNESS times the overall mean, and cut at
`max_tokens`. Passing and failing groups are about equally long, so that the pass rate alone costs 1 / pass_rate tokens
per trained token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import exp, lgamma

import numpy as np
from numpy.typing import NDArray

from dapo_mcore.types import FinishReason, Prompt, Response

HARDNESS = 0.6  # relative excess of the mean length where p = 0
CURVATURE = 0.03  # further excess at p = 0 and p = 1: makes up for what the cut takes from the hardest prompts
PROMPT_SPREAD = 0.35  # of the log length between prompts that are equally hard
RESPONSE_SPREAD = 0.65  # of the log length between responses to one prompt
BLOCK = 1_024  # prompts drawn together
LENGTH_STEP = 16  # tokens: lengths are rounded, so that responses of one length share their tokens
PROMPT_TOKENS = 256

RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True)
class Answers:
    """Of prompts in a row: [prompts, group_size] each."""

    lengths: NDArray[np.int64]  # tokens
    right: NDArray[np.bool_]

    @cached_property
    def passing(self) -> NDArray[np.bool_]:
        """[prompts]: whether the group is mixed."""
        number_right = self.right.sum(1)
        return (number_right > 0) & (number_right < self.right.shape[1])


@dataclass(frozen=True)
class Workload:
    """Answers are a function of (seed, policy version, prompt uid, sample index) alone."""

    pass_rate: float
    group_size: int
    mean_tokens: float
    max_tokens: int
    seed: int
    _blocks: dict[tuple[int, int], Answers] = field(default_factory=dict, compare=False, repr=False)

    def prompt(self, uid: int) -> Prompt:
        return Prompt(uid, uid, _tokens(PROMPT_TOKENS), "", RIGHT)

    def response(self, version: int, uid: int, index: int) -> Response:
        answers, row = self._block(version, uid // BLOCK), uid % BLOCK
        length = int(answers.lengths[row, index])
        return Response(
            token_ids=_tokens(length),
            logprobs=_logprobs(length),
            text=RIGHT if answers.right[row, index] else WRONG,
            finish_reason=FinishReason.LENGTH if length == self.max_tokens else FinishReason.STOP,
            version=version,
        )

    def passing(self, version: int, uids: Iterable[int]) -> list[int]:
        """Those of the prompts whose groups pass."""
        return [uid for uid in uids if self._block(version, uid // BLOCK).passing[uid % BLOCK]]

    def group_lengths(self, version: int, uids: Iterable[int]) -> NDArray[np.float64]:
        """[prompts]: mean tokens of each group's responses."""
        return np.array([self._block(version, uid // BLOCK).lengths[uid % BLOCK].mean() for uid in uids])

    def draw(self, rng: np.random.Generator, prompts: int) -> Answers:
        shape = _beta_shape(self.pass_rate, self.group_size)
        chance = rng.beta(shape, shape, (prompts, 1))
        right = rng.random((prompts, self.group_size)) < chance
        spread = PROMPT_SPREAD * rng.standard_normal((prompts, 1))
        spread = spread + RESPONSE_SPREAD * rng.standard_normal((prompts, self.group_size))
        spread -= (PROMPT_SPREAD**2 + RESPONSE_SPREAD**2) / 2  # the mean of exp is then 1
        hardness = 1 - 2 * chance
        lengths = self.mean_tokens * (1 + HARDNESS * hardness + CURVATURE * hardness**2) * np.exp(spread)
        rounded = np.ceil(lengths / LENGTH_STEP).astype(np.int64) * LENGTH_STEP
        return Answers(np.minimum(rounded, self.max_tokens), right)

    def _block(self, version: int, number: int) -> Answers:
        if (version, number) not in self._blocks:
            rng = np.random.default_rng((self.seed, version, number))
            self._blocks[version, number] = self.draw(rng, BLOCK)
        return self._blocks[version, number]


def _pass_rate(shape: float, group_size: int) -> float:
    """1 - 2 E[p^G] for p ~ Beta(shape, shape)."""
    log_moment = lgamma(shape + group_size) + lgamma(2 * shape) - lgamma(shape) - lgamma(2 * shape + group_size)
    return 1 - 2 * exp(log_moment)


@cache
def _beta_shape(pass_rate: float, group_size: int) -> float:
    low, high = 1e-6, 1e3  # the pass rate grows with the shape
    if not _pass_rate(low, group_size) < pass_rate < _pass_rate(high, group_size):
        raise ValueError(f"a pass rate of {pass_rate:g} is out of reach for groups of {group_size}")
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _pass_rate(middle, group_size) < pass_rate else (low, middle)
    return low


@cache
def _tokens(length: int) -> tuple[int, ...]:
    return (0,) * length


@cache
def _logprobs(length: int) -> tuple[float, ...]:
    return (-0.5,) * length
