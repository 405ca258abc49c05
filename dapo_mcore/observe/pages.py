"""Pages of sampled rollouts: text in Markdown, and HTML that shows pictures beside the responses to them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dapo_mcore.observe.pictures import PictureFolder
from dapo_mcore.types import Group, Prompt, Sample

STYLE = """\
body { font: 15px/1.4 sans-serif; margin: 2em; max-width: 75em }
section { display: flex; gap: 1.5em; border-top: 1px solid #bbb; padding: 1em 0 }
.prompt { flex: 0 0 22em } .responses { flex: 1; min-width: 0 }
img { max-width: 100%; min-width: 12em; border: 1px solid #ddd }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5em; margin: .3em 0 1em }
.right { border-left: 4px solid #2a8a3e } .wrong { border-left: 4px solid #c0392b }"""


def text_page(chosen: Sequence[tuple[Group, Sample]]) -> str:
    """Markdown."""
    return "\n".join(
        f"## {_judgement(sample)}\n\n**Prompt** (expected `{group.prompt.answer}`)\n\n```\n{group.prompt.text}\n```\n\n"
        f"**Response**\n\n```\n{sample.response.text}\n```\n"
        for group, sample in chosen
    )


def picture_page(title: str, chosen: Sequence[tuple[Group, Sample]], pictures: PictureFolder) -> str:
    """HTML; the responses to a prompt stand together, prompts in the order in which they come first."""
    by_prompt: dict[int, list[tuple[Group, Sample]]] = {}
    for group, sample in chosen:
        by_prompt.setdefault(group.prompt.uid, []).append((group, sample))
    sections = [_section(pairs[0][0].prompt, [sample for _, sample in pairs], pictures) for pairs in by_prompt.values()]
    return (
        f"<!doctype html>\n<meta charset=utf-8>\n<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n"
    )


def _section(prompt: Prompt, samples: Sequence[Sample], pictures: PictureFolder) -> str:
    images = "\n".join(f'<img src="{path}" alt="picture of the prompt">' for path in pictures.paths_of(prompt))
    responses = "\n".join(_response(sample) for sample in samples)
    return (
        f"<section>\n<div class=prompt>\n{images}\n<pre>{escape(prompt.text)}</pre>\n"
        f"expected <b>{escape(prompt.answer)}</b>\n</div>\n<div class=responses>\n{responses}\n</div>\n</section>"
    )


def _response(sample: Sample) -> str:
    kind = "right" if sample.verdict.accuracy else "wrong"
    return f"{escape(_judgement(sample))}\n<pre class={kind}>{escape(sample.response.text)}</pre>"


def _judgement(sample: Sample) -> str:
    response, verdict = sample.response, sample.verdict
    size = f"{len(response.token_ids)} tokens, {response.finish_reason}"
    return f"{verdict.outcome}, accuracy {verdict.accuracy:g}, {size}"
