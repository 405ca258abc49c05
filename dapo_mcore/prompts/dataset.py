"""Prompts of a run: read, encoded, filtered by length, and kept apart from the validation's."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_mcore.config import DataConfig, SourceConfig, Truncation
from dapo_mcore.prompts.encode import encode
from dapo_mcore.prompts.problem import Problem
from dapo_mcore.prompts.readers import ROWS_NAMED, read_problems
from dapo_mcore.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[Problem, list[int]]


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """What became of a source's rows."""

    rows: int
    excluded: int  # also in validation
    overlong: int  # dropped: above data.max_prompt_length
    truncated: int  # cut to data.max_prompt_length
    kept: int

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.rows} prompts ({self.excluded} also in validation, {self.overlong} over-long, "
            f"{self.truncated} truncated)"
        )


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in the order of their rows, uid = position in this set."""

    prompts: tuple[Prompt, ...]
    questions: frozenset[str]  # of all rows, over-long ones too: what another set may exclude
    counts: PromptCounts

    def __len__(self) -> int:
        return len(self.prompts)


def build_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    exclude: Collection[str] = (),
) -> PromptSet:
    """The prompts of `source`; `name` is the option that holds it, e.g. data.train, for messages.

    `exclude` holds questions to leave out: `questions` of the validation set, under data.exclude_val_from_train.

    Raises:
        ValueError: rows that cannot be used; no prompts left; a prompt above data.max_prompt_length under
            data.truncation=error and no filter.
    """
    problems = read_problems(source, name)
    wanted = [problem for problem in problems if problem.question not in exclude]
    ids = encode(wanted, tokenizer, instruction=data.instruction, apply_chat_template=data.apply_chat_template)
    encoded = list(zip(wanted, ids, strict=True))
    kept = [pair for pair in encoded if len(pair[1]) <= data.max_prompt_length]
    overlong = len(encoded) - len(kept)
    if not data.filter_overlong_prompts:
        _refuse_overlong(encoded, data, name)
        kept = [(problem, _cut(tokens, data)) for problem, tokens in encoded]
    counts = PromptCounts(
        rows=len(problems),
        excluded=len(problems) - len(wanted),
        overlong=overlong if data.filter_overlong_prompts else 0,
        truncated=0 if data.filter_overlong_prompts else overlong,
        kept=len(kept),
    )
    if not kept:
        raise ValueError(
            f"{name}: {counts}: nothing left; raise data.max_prompt_length={data.max_prompt_length}, or give problems "
            "that validation does not have"
        )
    return PromptSet(
        prompts=tuple(_prompt(uid, pair, tokenizer) for uid, pair in enumerate(kept)),
        questions=frozenset(problem.question for problem in problems),
        counts=counts,
    )


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of tokens and answers in order: equal for equal data, whatever file held it."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.token_ids, prompt.answer)).encode())
    return digest.hexdigest()


def _prompt(uid: int, pair: Encoded, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    problem, tokens = pair
    return Prompt(uid, problem.row, tuple(tokens), str(tokenizer.decode(tokens)), problem.answer, problem.metadata)


def _cut(tokens: list[int], data: DataConfig) -> list[int]:
    length = data.max_prompt_length
    return tokens[-length:] if data.truncation is Truncation.left else tokens[:length]


def _refuse_overlong(encoded: Sequence[Encoded], data: DataConfig, name: str) -> None:
    places = [problem.place for problem, tokens in encoded if len(tokens) > data.max_prompt_length]
    if not places or data.truncation is not Truncation.error:
        return
    longest = max(len(tokens) for _, tokens in encoded)
    raise ValueError(
        f"{name}: {len(places)} prompts are longer than data.max_prompt_length={data.max_prompt_length} tokens, the "
        f"longest has {longest} ({', '.join(places[:ROWS_NAMED])}{' ...' if len(places) > ROWS_NAMED else ''}); "
        "raise it, or set data.filter_overlong_prompts=true or data.truncation=left"
    )
