"""Problems from files or from a reasoning-gym task. Whatever is wrong with the rows is told in one error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dapo_mcore.config import SourceConfig
from dapo_mcore.prompts.files import rows_of
from dapo_mcore.prompts.images import NO_IMAGES, ImageColumn
from dapo_mcore.prompts.problem import Problem, RowFault, problem_from

ROWS_NAMED = 5


def read_problems(source: SourceConfig, name: str, images: ImageColumn = NO_IMAGES) -> list[Problem]:
    """All problems of `source`, at most `source.size`; `name` is the option that holds it, e.g. data.train.

    Pictures are read from the column that `images` names; a file that is named there lies relative to the data's.

    Raises:
        ValueError: rows that cannot be used, by file and number; no rows at all; an unknown task.
    """
    problems = _from_task(source, name) if source.task else _from_files(source, name, images)
    if not problems:
        where = ", ".join(source.files) or source.task
        raise ValueError(f"{name}: no problems in {where} (size={source.size}); give files with rows, or another size")
    return problems


def _from_files(source: SourceConfig, name: str, images: ImageColumn) -> list[Problem]:
    pattern = _answer_pattern(source.answer_pattern, name)
    names = dict(zip(source.files, set_names(source.files), strict=True))
    problems: list[Problem] = []
    faults: dict[tuple[str, str], list[int]] = {}  # (file, fault) -> rows
    rows = ((file, *row) for file in source.files for row in rows_of(file))
    index = -1
    for index, (file, number, row) in enumerate(islice(rows, source.size if source.size >= 0 else None)):
        try:
            if isinstance(row, RowFault):
                raise row
            problem = problem_from(row, index, f"{file} row {number}", source, pattern, names[file])
            problems.append(images.add(problem, row, Path(file).parent))
        except RowFault as fault:
            faults.setdefault((file, str(fault)), []).append(number)
    if faults:
        raise ValueError(_told(faults, index + 1, name))
    return problems


def set_names(files: Sequence[str]) -> list[str]:
    """Each file's name without its ending, and as many of its folders as it takes to tell the files apart."""
    paths = [Path(file).with_suffix("").parts for file in files]
    depths = range(1, max(map(len, paths), default=0) + 1)
    candidates = [["/".join(path[-depth:]) for path in paths] for depth in depths]
    return next((names for names in candidates if len(set(names)) == len(set(paths))), [])


def _told(faults: dict[tuple[str, str], list[int]], total: int, name: str) -> str:
    bad = sum(len(rows) for rows in faults.values())
    lines = [f"{name}: {bad} of {total} rows cannot be used"]
    for (file, fault), rows in faults.items():
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        lines.append(f"  {file}: row {', '.join(map(str, rows[:ROWS_NAMED]))}{more}: {fault}")
    lines.append(
        f"  correct or remove them; if these are all rows, check {name}.prompt_key, .answer_key, .answer_pattern and "
        "data.image_key"
    )
    return "\n".join(lines)


def _answer_pattern(pattern: str, name: str) -> re.Pattern[str] | None:
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name}.answer_pattern={pattern!r}: not a regular expression ({error}); correct it"
        ) from error
    if not compiled.groups:
        raise ValueError(f"{name}.answer_pattern={pattern!r}: has no group; put parentheses around the answer")
    return compiled


def _from_task(source: SourceConfig, name: str) -> list[Problem]:
    """Item i is drawn from seed + i, so sets whose seeds lie less than their size apart share problems."""
    return [_task_problem(source, row, entry) for row, entry in enumerate(_entries(source, name))]


def _entries(source: SourceConfig, name: str) -> Iterator[dict[str, Any]]:
    import reasoning_gym  # 2 s of imports that files do not need

    if source.size <= 0:
        raise ValueError(f"{name}.size={source.size}: a task has no size of its own; say how many problems to draw")
    try:
        task = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.task_options)
    except ValueError as error:
        raise ValueError(f"{name}.task={source.task}: {error}; correct the spelling") from error
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name}.task_options={source.task_options}: refused by {source.task} ({error})") from error
    return (task[index] for index in range(source.size))


def _task_problem(source: SourceConfig, row: int, entry: dict[str, Any]) -> Problem:
    """Some tasks have a scorer but no gold text: their answer is empty."""
    return Problem(
        row=row,
        place=f"{source.task} item {row}",
        messages=({"role": "user", "content": entry["question"]},),
        answer=str(entry["answer"]) if entry["answer"] is not None else "",
        metadata={"task": source.task, "task_options": source.task_options, "entry": entry},
        source=source.task,
    )
