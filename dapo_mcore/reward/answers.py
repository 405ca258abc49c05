"""Where the final answer stands in a response."""

from __future__ import annotations

import re

TAIL_CHARS = 16_384  # an answer stands at the end: what lies further back is never scanned

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def tail(text: str) -> str:
    """The part of a response that verifiers look at: its last TAIL_CHARS characters."""
    return text[-TAIL_CHARS:]


def marked_answer(text: str) -> str | None:
    r"""What the response itself marks as its answer; None when it marks nothing.

    The last `<answer>...</answer>`; the last `\boxed{...}`, within that tag if there is one; what follows the last
    `####` on its line.
    Only the last mark counts, so that a list of guesses is not an answer.
    """
    tags = _TAG.findall(text)
    if tags:
        text = tags[-1]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if tags:
        return text.strip()
    lines = _HASHES.findall(text)
    return lines[-1].strip() if lines else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, braces balanced; None without one."""
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        depth = 0
        opening = start + len(r"\boxed")
        for index in range(opening, len(text)):
            depth += (text[index] == "{") - (text[index] == "}")
            if depth == 0:
                return text[opening + 1 : index]
        end = start
    return None
