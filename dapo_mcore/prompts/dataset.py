"""Prompts of a run: read, encoded, filtered by length, and kept apart from the validation's."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dapo_mcore.config import DataConfig, SourceConfig, Truncation
from dapo_mcore.prompts.encode import encode
from dapo_mcore.prompts.images import ImageColumn
from dapo_mcore.prompts.problem import Problem
from dapo_mcore.prompts.readers import ROWS_NAMED, read_problems
from dapo_mcore.prompts.vision import ImageTokens, refuse_pictures
from dapo_mcore.types import Prompt, VisualSpan, expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """A problem in tokens, with one placeholder for each of its pictures."""

    problem: Problem
    token_ids: list[int]
    spans: tuple[VisualSpan, ...]

    @property
    def length(self) -> int:
        """In tokens of text and pictures."""
        return len(expand(self.token_ids, self.spans))


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
    vision: ImageTokens | None = None,
) -> PromptSet:
    """The prompts of `source`; `name` is the option that holds it, e.g. data.train, for messages.

    `exclude` holds questions to leave out: `questions` of the validation set, under data.exclude_val_from_train.
    `vision` says how many tokens a picture takes; None for a model that reads text alone.

    Raises:
        ValueError: rows that cannot be used, pictures for a model of text; no prompts left; a prompt above
            data.max_prompt_length, pictures included, under data.truncation=error and no filter.
    """
    problems = read_problems(source, name, ImageColumn(data.image_key, data.max_pixels))
    if vision is None:
        refuse_pictures(problems, name)
    wanted = [problem for problem in problems if problem.question not in exclude]
    encoded = _encoded(wanted, data, tokenizer, vision)
    kept = [entry for entry in encoded if entry.length <= data.max_prompt_length]
    overlong = len(encoded) - len(kept)
    if not data.filter_overlong_prompts:
        _refuse_overlong(encoded, data, name)
        kept = [replace(entry, token_ids=_cut(entry.token_ids, data)) for entry in encoded]
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
        prompts=tuple(_prompt(uid, entry, tokenizer) for uid, entry in enumerate(kept)),
        questions=frozenset(problem.question for problem in problems),
        counts=counts,
    )


def _encoded(
    problems: Sequence[Problem], data: DataConfig, tokenizer: PreTrainedTokenizerBase, vision: ImageTokens | None
) -> list[Encoded]:
    ids = encode(problems, tokenizer, instruction=data.instruction, apply_chat_template=data.apply_chat_template)
    return [
        Encoded(problem, tokens, vision.spans(problem, tokens) if vision else ())
        for problem, tokens in zip(problems, ids, strict=True)
    ]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of tokens, answers and pictures in order: equal for equal data, whatever file held it."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.token_ids, prompt.answer)).encode())
        for image in prompt.images:
            digest.update(image.data)
    return digest.hexdigest()


def _prompt(uid: int, entry: Encoded, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    problem, tokens = entry.problem, entry.token_ids
    return Prompt(
        uid=uid,
        row=problem.row,
        token_ids=tuple(tokens),
        text=str(tokenizer.decode(tokens)),
        answer=problem.answer,
        metadata=problem.metadata,
        images=problem.images,
        visual_spans=entry.spans,
        source=problem.source,
    )


def _cut(tokens: list[int], data: DataConfig) -> list[int]:
    length = data.max_prompt_length
    return tokens[-length:] if data.truncation is Truncation.left else tokens[:length]


def _refuse_overlong(encoded: Sequence[Encoded], data: DataConfig, name: str) -> None:
    """Those that are not to be cut: all of them under data.truncation=error, else those with pictures."""
    refused = [
        entry
        for entry in encoded
        if entry.length > data.max_prompt_length and (data.truncation is Truncation.error or entry.spans)
    ]
    if not refused:
        return
    longest = max(entry.length for entry in refused)
    places = [entry.problem.place for entry in refused]
    cut = " (a prompt with pictures is never cut)" if any(entry.spans for entry in refused) else ""
    raise ValueError(
        f"{name}: {len(places)} prompts are longer than data.max_prompt_length={data.max_prompt_length} tokens, the "
        f"longest has {longest} ({', '.join(places[:ROWS_NAMED])}{' ...' if len(places) > ROWS_NAMED else ''}); "
        f"raise it, or set data.filter_overlong_prompts=true or data.truncation=left{cut}"
    )
