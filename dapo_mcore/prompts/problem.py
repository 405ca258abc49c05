"""A row of a data set as a problem: messages, answer, and the rest for the verifier."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapo_mcore.config import SourceConfig
from dapo_mcore.types import EncodedImage

Message = Mapping[str, str]  # {"role": ..., "content": ...}


SOURCE_KEY = "data_source"  # where verl's data sets say which one a row belongs to


class RowFault(ValueError):
    """A row that is no problem; says why, in words that are the same for every row of that fault."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question before it is put in the policy's words."""

    row: int  # counted from 0 over all rows of the source
    place: str  # where people find it: file and row, or task and item
    messages: tuple[Message, ...]  # a prompt that is plain text is one user message
    answer: str
    metadata: Mapping[str, Any]
    images: tuple[EncodedImage, ...] = ()
    source: str = ""  # the data set it belongs to

    @property
    def text(self) -> str:
        return " ".join(message["content"] for message in self.messages)

    @property
    def question(self) -> str:
        """What makes two problems the same: the text of all messages, white space aside, and the pictures."""
        pictures = (hashlib.blake2b(image.data, digest_size=16).hexdigest() for image in self.images)
        return " ".join([*self.text.split(), *pictures])


def problem_from(
    row: Mapping[str, Any],
    number: int,
    place: str,
    source: SourceConfig,
    pattern: re.Pattern[str] | None,
    set_name: str = "",
) -> Problem:
    """`set_name` is that of the data set, for rows that do not name theirs.

    Raises:
        RowFault: the row lacks a prompt or an answer, or they are not of a kind that can be read.
    """
    return Problem(
        row=number,
        place=place,
        messages=_messages(_column(row, "prompt_key", source.prompt_key)),
        answer=_answer(_column(row, "answer_key", source.answer_key), source.answer_key, pattern),
        metadata={column: value for column, value in row.items() if column != source.prompt_key},
        source=_source(row, set_name),
    )


def _source(row: Mapping[str, Any], otherwise: str) -> str:
    named = row.get(SOURCE_KEY)
    return named.strip() if isinstance(named, str) and named.strip() else otherwise


def _column(row: Mapping[str, Any], option: str, key: str) -> Any:
    """The column `key`; where there is none of that name, a dot steps into a nested one."""
    value: Any = row
    for part in [key] if key in row else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RowFault(f"no column {option}={key} (there are: {', '.join(map(str, row))})")
        value = value[part]
    return value


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not all(_is_message(message) for message in prompt):
        raise RowFault("the prompt is neither text nor a list of {role, content} messages")
    text = "".join(message["content"] for message in prompt)
    if not text.strip():
        raise RowFault("empty prompt")
    _refuse_half_characters(text)
    if prompt[-1]["role"] == "assistant":
        raise RowFault("the last message is the assistant's: nothing is left to answer")
    return tuple({"role": message["role"], "content": message["content"]} for message in prompt)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _answer(value: Any, key: str, pattern: re.Pattern[str] | None) -> str:
    if value is None or value != value:  # NaN is how data frames write "nothing"
        raise RowFault(f"no answer in answer_key={key}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowFault(f"answer_key={key} holds a {type(value).__name__}, not text or a number")
    text = str(value)
    if pattern:
        found = pattern.search(text)
        if not found:
            raise RowFault(f"answer_pattern={pattern.pattern!r} finds nothing in answer_key={key}")
        text = found.group(1) or ""
    if not text.strip():
        raise RowFault(f"no answer in answer_key={key}")
    _refuse_half_characters(text)
    return text.strip()


def _refuse_half_characters(text: str) -> None:
    r"""JSON may escape one half of a pair, such as \ud83d: no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowFault("not Unicode (half of a surrogate pair)") from None
