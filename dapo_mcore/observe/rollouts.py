"""Sampled rollouts, written out to be read: rollouts/<phase>_<step>.jsonl for tools, .md for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dapo_mcore.types import Group, Sample


def write_rollouts(folder: Path, name: str, groups: Sequence[Group], keep: int) -> None:
    """The first `keep` responses of the groups, spread over as many prompts as possible."""
    chosen = _spread(groups, keep)
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    records = [json.dumps(_record(group, sample), ensure_ascii=False) for group, sample in chosen]
    (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    (folder / f"{name}.md").write_text("\n".join(_page(group, sample) for group, sample in chosen))


def _spread(groups: Sequence[Group], keep: int) -> list[tuple[Group, Sample]]:
    """Sample 0 of every group, then sample 1, ... up to `keep`."""
    size = max((len(g.samples) for g in groups), default=0)
    every = [(g, g.samples[i]) for i in range(size) for g in groups if i < len(g.samples)]
    return every[:keep]


def _record(group: Group, sample: Sample) -> dict[str, object]:
    response, verdict = sample.response, sample.verdict
    return {
        "uid": group.prompt.uid,
        "row": group.prompt.row,
        "prompt": group.prompt.text,
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


def _page(group: Group, sample: Sample) -> str:
    response, verdict = sample.response, sample.verdict
    size = f"{len(response.token_ids)} tokens, {response.finish_reason}"
    judged = f"{verdict.outcome}, accuracy {verdict.accuracy:g}, {size}"
    return (
        f"## {judged}\n\n**Prompt** (expected `{group.prompt.answer}`)\n\n```\n{group.prompt.text}\n```\n\n"
        f"**Response**\n\n```\n{response.text}\n```\n"
    )
