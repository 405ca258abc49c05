"""Where the final answer stands in a response."""

from __future__ import annotations

import re

TAIL_CHARS = 16_384  # an answer stands at the end: what lies further back is never scanned

_OPEN, _CLOSE = "<answer>", "</answer>"
_BRACES = re.compile(r"\\boxed\{|[{}]")
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
    tagged = last_tagged(text)
    if tagged is not None:
        text = tagged
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if tagged is not None:
        return text.strip()
    lines = _HASHES.findall(text)
    return lines[-1].strip() if lines else None


def last_tagged(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, from the first `<answer>` that it closes on; None without
    one. In linear time: policies that got stuck repeat a tag to the end, and a regular expression's would be quadratic.
    """
    end = len(text)
    while (closing := text.rfind(_CLOSE, 0, end)) >= 0:
        before = text.rfind(_CLOSE, 0, closing)
        opening = text.find(_OPEN, before + len(_CLOSE) if before >= 0 else 0, closing)
        if opening >= 0:
            return text[opening + len(_OPEN) : closing]
        end = closing
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, braces balanced; None without one. In linear time, likewise."""
    begun: list[int] = []  # of each open brace where its box's content begins; 0: no box's
    last = (0, 0)  # of the last complete box where its content begins and ends
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            begun.append(brace.end() if brace[0] != "{" else 0)
        elif begun:
            last = max(last, (begun.pop(), brace.start()))
    return text[slice(*last)] if last[0] else None
