"""Problems -> token ids, with a chat template or as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dapo_mcore.prompts.images import IMAGE_MARK
from dapo_mcore.prompts.problem import Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, *, instruction: str, apply_chat_template: bool
) -> list[list[int]]:
    """Token ids of each problem, ready to be continued by the policy.

    With a template the ids are the template's text with the generation prompt, and nothing else (as verl does). Without
    one they are what the tokenizer makes of the text, a beginning-of-sequence token included if it adds one: what base
    models were trained on.

    Raises:
        ValueError: no chat template, one that refuses the messages, or several messages and no template to join them.
    """
    asked = [with_instruction(problem.messages, instruction) for problem in problems]
    if apply_chat_template:
        texts = [_templated(messages, problem, tokenizer) for messages, problem in zip(asked, problems, strict=True)]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
    _refuse_appended_eos(tokenizer)
    texts = [_plain(messages, problem) for messages, problem in zip(asked, problems, strict=True)]
    return tokenizer(texts)["input_ids"]  # pyright: ignore[reportReturnType]


def with_instruction(messages: Sequence[Message], instruction: str) -> list[dict[str, str]]:
    """The instruction at the end of the last message, after a space unless it begins with white space itself."""
    *before, last = (dict(message) for message in messages)
    if instruction:
        gap = "" if instruction[0].isspace() else " "
        last["content"] += gap + instruction
    return [*before, last]


def _templated(messages: list[dict[str, str]], problem: Problem, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "data.apply_chat_template=True: the model's tokenizer has no chat template; set it to false for a base "
            "model, or add chat_template.jinja to the model folder"
        )
    try:
        shown = [_in_parts(message) for message in messages] if problem.images else messages
        text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"data.apply_chat_template=True: the model's chat template refuses {problem.place} with roles {roles} "
            f"({error}); rewrite the messages"
        ) from error
    return str(text)


def _in_parts(message: dict[str, str]) -> dict[str, Any]:
    """The message as templates of vision-language models take it: text and pictures in turn."""
    pieces = re.split(f"({re.escape(IMAGE_MARK)})", message["content"])
    parts = [{"type": "image"} if piece == IMAGE_MARK else {"type": "text", "text": piece} for piece in pieces if piece]
    return {"role": message["role"], "content": parts}


def _plain(messages: list[dict[str, str]], problem: Problem) -> str:
    if len(messages) > 1:
        raise ValueError(
            f"data.apply_chat_template=False: {problem.place} has {len(messages)} messages and no template says "
            "how to join them; set it to true, or give one text per row"
        )
    if problem.images:
        raise ValueError(
            f"data.apply_chat_template=False: {problem.place} has pictures, and a template says what stands for them; "
            "set it to true"
        )
    return messages[0]["content"]


def _refuse_appended_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    added = tokenizer("")["input_ids"]
    if added and tokenizer.eos_token_id is not None and added[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:  # pyright: ignore
        raise ValueError(
            f"data.apply_chat_template=False: the tokenizer ends every text with {tokenizer.eos_token}, which leaves "
            "nothing to answer; set add_eos_token to false in the model's tokenizer_config.json"
        )
