"""Responses to geometry problems with their gold answers: what verl's geo3k reward is asked about (make_geo3k.py)."""

from __future__ import annotations

INTEGER, DECIMAL, ROOT, FRACTION = "5", "8.5", r"2 \sqrt { 221 }", r"\frac { 45 } { 2 }"

# gold answer -> what stands in the box
BOXED = {
    INTEGER: [
        "5", " 5 ", "5.0", "5.00", r"\text{5}", "x=5", "x = 5", "5 cm", r"5 \text{ cm}", r"5\text{ units}", r"5^\circ",
        r"5^{\circ}", "5°", "5 degrees", "$5$", "05", "+5", "-5", "4", "6", "55", "5.1", "4.9999", r"\sqrt{25}",
        r"\frac{10}{2}", "10/2", "2+3", r"\frac{5}{1}", "five", "", "5, 6", "(5)", "5x", r"5\%", r"\$5", "x", "?",
        "None", "5!", r"\frac{5}{",
    ],
    "1234": ["1234", "1,234", "1{,}234", "1234.0", "12 34", "1,23", "1235"],
    DECIMAL: ["8.5", "17/2", r"\frac{17}{2}", r"\frac172", r"8\frac{1}{2}", "8.50", "8,5", "8.4", "9", r"\frac{34}{4}"],
    ROOT: [
        r"2\sqrt{221}", r"2 \sqrt { 221 }", r"2\sqrt{221} \text{ cm}", r"\sqrt{884}", "2sqrt(221)", "29.73", "29.7321",
        r"x=2\sqrt{221}", r"\sqrt{221}", r"2\sqrt{22}", r"4\sqrt{221}/2", "30",
    ],
    FRACTION: [
        r"\frac{45}{2}", r"\frac { 45 } { 2 }", "45/2", "22.5", r"22.5^\circ", r"\dfrac{45}{2}", r"\tfrac{45}{2}",
        r"22\frac{1}{2}", r"\frac{90}{4}", "90/4", "22", "23", r"\frac{2}{45}", "22.5 degrees",
    ],
    r"8 \pi": [r"8\pi", r"8 \pi", "25.13", "8", "8π"],
    "40": ["40", r"40^\circ", r"m\angle ABC = 40", r"\angle 1 = 40^\circ", r"\theta = 40^\circ", "0.4", r"40\%", "140"],
}  # fmt: skip

THOUGHT = r"<think>Two angles are equal.</think> So it is \boxed{%s}."  # the shape that verl asks for
BARE = r"It is \boxed{%s}."
WHOLE = [
    (r"<think>a</think>\boxed{5}", INTEGER),
    ("<think>a\nb</think>\n\n" + r"\boxed{5}" + "\n", INTEGER),
    (r"<think></think>\boxed{5}", INTEGER),
    (r" <think>a</think>\boxed{5}", INTEGER),
    (r"Well. <think>a</think>\boxed{5}", INTEGER),
    (r"<think>a\boxed{5}</think>", INTEGER),
    (r"<think>a\boxed{5}</think> 5", INTEGER),
    (r"<think>a\boxed{5}</think> \boxed{6}", INTEGER),
    (r"<think>a\boxed{6}</think> \boxed{5}", INTEGER),
    (r"<think>a</think> \boxed{6} no, \boxed{5}", INTEGER),
    (r"<think>a</think> \boxed{5} no, \boxed{6}", INTEGER),
    (r"<think>a</think> \boxed{5} so \boxed{5", INTEGER),
    (r"<think>a</think> \boxed{5", INTEGER),
    (r"<think>a</think> \boxed 5", INTEGER),
    (r"<think>a</think> \boxed{\frac{10}{2}", INTEGER),
    (r"<think>a</think> <answer>5</answer>", INTEGER),
    ("<think>a</think> #### 5", INTEGER),
    ("<think>a</think> 5", INTEGER),
    (r"<think>a <think>b</think> c</think> \boxed{5}", INTEGER),
    (r"<think>a \boxed{5}", INTEGER),
    (r"a</think> \boxed{5}", INTEGER),
    (r"<THINK>a</THINK> \boxed{5}", INTEGER),
    (r"<think>a</think> \boxed{\boxed{5}}", INTEGER),
    (r"<think>a</think> \fbox{5}", INTEGER),
    (r"<think>a</think> \boxed{5} is the length of \overline{AB}}", INTEGER),
    ("", INTEGER),
]
RESPONSES: list[tuple[str, str]] = [
    *((THOUGHT.replace("%s", box), answer) for answer, boxes in BOXED.items() for box in boxes),
    *((BARE.replace("%s", box), answer) for answer, boxes in BOXED.items() for box in boxes[:2]),
    *WHOLE,
]
