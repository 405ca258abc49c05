"""Sampled rollouts, written out to be read: rollouts/<phase>_<step>.jsonl for tools, a page for people.

The page is <phase>_<step>.md, or .html where prompts have pictures; these lie in rollouts/pictures, each once per run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dapo_mcore.observe.pages import picture_page, text_page
from dapo_mcore.observe.pictures import PictureFolder
from dapo_mcore.types import Group, Sample


def write_rollouts(folder: Path, name: str, groups: Sequence[Group], keep: int) -> None:
    """The first `keep` responses of the groups, spread over as many prompts as possible."""
    chosen = _spread(groups, keep)
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictures = PictureFolder(folder)
    records = [json.dumps(_record(group, sample, pictures), ensure_ascii=False) for group, sample in chosen]
    (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    if any(group.prompt.images for group, _ in chosen):
        (folder / f"{name}.html").write_text(picture_page(name, chosen, pictures))
    else:
        (folder / f"{name}.md").write_text(text_page(chosen))


def _spread(groups: Sequence[Group], keep: int) -> list[tuple[Group, Sample]]:
    """Sample 0 of every group, then sample 1, ... up to `keep`."""
    size = max((len(g.samples) for g in groups), default=0)
    every = [(g, g.samples[i]) for i in range(size) for g in groups if i < len(g.samples)]
    return every[:keep]


def _record(group: Group, sample: Sample, pictures: PictureFolder) -> dict[str, object]:
    response, verdict = sample.response, sample.verdict
    shown = {"pictures": pictures.paths_of(group.prompt)} if group.prompt.images else {}
    return {
        "uid": group.prompt.uid,
        "row": group.prompt.row,
        "source": group.prompt.source,
        "prompt": group.prompt.text,
        **shown,
        "answer": group.prompt.answer,
        "response": response.text,
        "accuracy": verdict.accuracy,
        "score": verdict.score,
        "outcome": verdict.outcome,
        "finish_reason": response.finish_reason,
        "tokens": len(response.token_ids),
        "logprob": sum(response.logprobs),
        "version": response.version,
    }
