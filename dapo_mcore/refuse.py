"""How a value is refused: one line that names it, says why, and shows the way out."""

from typing import NoReturn


def refuse(option: str, value: object, reason: str, way_out: str) -> NoReturn:
    raise ValueError(f"{option}={value}: {reason}; {way_out}")
