"""How large the numbers in an expression can get, found without computing them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

MAX_DIGITS = 100_000.0  # of a number; sympy has it at once, and no gold is larger

_OPEN, _CLOSE = frozenset("({["), frozenset(")}]")
_POWER = r"\^|(?<=[\d)])\*\*(?=[\d(])"  # elsewhere asterisks print bold
_TOKEN = re.compile(rf"\d+(?:\.\d+)?|\\[a-zA-Z]+|{_POWER}|!+|[a-zA-Z(){{}}\[\]]")
_SILENT = frozenset([r"\frac", r"\dfrac", r"\tfrac", r"\cfrac", r"\sqrt", r"\left", r"\right"])  # a group follows
_NAME = 2.0  # stands for a letter or a command


def end_of_huge_number(text: str) -> int:
    r"""Where in `text` the last power or factorial of more than MAX_DIGITS digits ends; 0: there is none.

    `9^{9^{9}}`: sympy, asked to read it, would compute it, until the deadline of the verifier. An upper bound is
    looked at, in which sums, quotients and roots are products, signs are left out and letters are 2. In linear time.
    """
    found, groups, raises = 0, [_Group()], False
    for token in _TOKEN.finditer(text):
        word, value = token[0], _NAME
        if word in _OPEN:
            groups.append(_Group(is_exponent=raises))
            raises = False
            continue
        if word in ("^", "**"):
            raises = True
            continue
        if word in _SILENT:
            continue
        if word[0] == "!":
            groups[-1].factorial()
        else:
            is_exponent = raises
            if word in _CLOSE:
                group = groups.pop() if len(groups) > 1 else _Group()
                value, is_exponent = group.close(), group.is_exponent
            elif word[0].isdigit():
                value = float(word) + 1.0
            groups[-1].add(value, is_exponent)
        raises = False
        if groups[-1].is_huge():
            found = token.end()
    return found


@dataclass(slots=True)
class _Group:
    """What stands between two brackets."""

    is_exponent: bool = False
    product: float = 1.0  # of all that is complete
    tower: list[float] = field(default_factory=list)  # base, exponent, exponent of that, ...

    def add(self, value: float, is_exponent: bool) -> None:
        if not is_exponent:
            self.product, self.tower = self.close(), []
        self.tower.append(value)

    def factorial(self) -> None:
        """n! is at most n^n."""
        if self.tower:
            self.tower.append(self.tower[-1])

    def close(self) -> float:
        return min(self.product * 10.0 ** min(self._digits(), 300.0), 1e300)

    def is_huge(self) -> bool:
        return len(self.tower) > 1 and self._digits() > MAX_DIGITS

    def _digits(self) -> float:
        """log10 of the tower, at most 1e300."""
        exponent = 1.0
        for value in reversed(self.tower[1:]):
            exponent = 10.0 ** min(exponent * math.log10(value), 300.0) if value > 1 else 1.0
        return min(exponent * math.log10(max(self.tower[0], 1.0)), 1e300) if self.tower else 0.0
