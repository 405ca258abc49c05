"""What sympy is not asked to compute. Sizes are those of Python's integers, where these can be computed at all."""

import math

import pytest

from dapo_mcore.reward.magnitude import MAX_DIGITS, end_of_huge_number
from dapo_mcore.reward.math import verify

HUGE = [
    "9^{9^{9}}", "9^9^9", "9**9**9", "9^{(9^9)}", "2^{10^{100}}", "10^{1000000}", "10^{-1000000}", "(9!)!", "99999999!",
    r"2^{999999 \cdot 9}", "(x+1)^{1000000}", "x^{9^{9}}", r"\left(9^{9}\right)^{9^{9}}", r"\frac{1}{9^{9^{9}}}",
    "1 + 9^{9^{9}} - 9^{9^{9}} + 41", "9^{" * 300 + "9" + "}" * 300, "9" * 400 + "^{" + "9" * 400 + "}",
]  # fmt: skip
GOLD = [
    "2^{100}", "10^{-9}", "x^{2^{3}}", "2^{2^{10}}", "2024^{2024}", "10^{10000}", "7^{2025} - 1", "2024!", "9!!",
    r"30^\circ", r"90^{\circ}", r"3 \times 10^{8}", r"\frac{2^{50}}{3^{20}}", "e^{-x^{2}}", r"x^{\frac{1}{2}}",
    r"\left(\frac{1}{2}\right)^{10}", "123456789012345678901234567890",
]  # fmt: skip


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:20])
def test_huge_numbers_are_wrong_and_not_computed(text):
    assert end_of_huge_number(text)
    assert verify(rf"\boxed{{{text}}}", "42", {}).accuracy == 0
    assert verify(f"It is ${text}$", "42", {}).accuracy == 0


@pytest.mark.parametrize("text", GOLD)
def test_powers_of_people_are_read(text):
    assert not end_of_huge_number(text)
    assert verify(rf"\boxed{{{text}}}", text, {}).accuracy == 1


def test_the_limit_is_in_digits():
    exponents = [int(share * MAX_DIGITS / math.log10(8)) for share in (0.99, 1.01)]  # 7 counts as 8: an upper bound
    assert [bool(end_of_huge_number(f"7^{{{exponent - 1}}}")) for exponent in exponents] == [False, True]


def test_an_answer_after_a_huge_number_is_read():
    assert verify("Not $9^{9^{9}}$ but 42", "42", {}).accuracy == 1
    assert verify(r"Not 9^{9^{9}} but \boxed{42}", "42", {}).accuracy == 1
    assert verify("It is **1234567**", "1234567", {}).accuracy == 1
