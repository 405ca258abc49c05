"""What is kept of sampled rollouts: rows for tools, pages for people, pictures as files."""

import json
import re
from html import unescape
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dapo_mcore.observe.pictures import LONGEST_SIDE
from dapo_mcore.observe.rollouts import write_rollouts
from dapo_mcore.types import EncodedImage, FinishReason, Group, Prompt, Response, Sample, Verdict


def encoded(width, height, colour, kind="PNG"):
    file = BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return EncodedImage(file.getvalue(), width, height)


def group(uid, images, *responses):
    samples = tuple(
        Sample(Response((1, 2), (-0.5, -0.25), text, FinishReason.STOP, 0), Verdict(accuracy, 2 * accuracy - 1))
        for text, accuracy in responses
    )
    return Group(Prompt(uid, 9, (7,), f"question {uid} <tag>", "4 <tag>", images=images), samples)


RED, GREEN = (encoded(40, 30, colour) for colour in ("red", "green"))
WIDE = encoded(3 * LONGEST_SIDE, LONGEST_SIDE, "blue", "JPEG")
SEEN = (
    group(0, (RED,), ("a < 4", 0.0), ("4", 1.0)),
    group(1, (WIDE, RED, GREEN), ("4 & done", 1.0)),
    group(2, (), ("7", 0.0)),
)


@pytest.fixture
def written(tmp_path):
    write_rollouts(tmp_path / "rollouts", "val_000005", SEEN, keep=4)
    return tmp_path / "rollouts"


def test_every_picture_is_one_file_written_once_however_many_prompts_and_responses_show_it(written):
    for file in (written / "pictures").iterdir():
        file.write_text("there")
    write_rollouts(written, "val_000010", SEEN, keep=4)
    assert [file.read_text() for file in (written / "pictures").iterdir()] == ["there"] * 3


def test_what_is_kept_is_spread_over_the_prompts_and_says_how_likely_it_was(tmp_path):
    write_rollouts(tmp_path, "val_000005", SEEN, keep=3)
    rows = [json.loads(line) for line in (tmp_path / "val_000005.jsonl").read_text().splitlines()]
    assert [(row["uid"], row["logprob"]) for row in rows] == [(0, -0.75), (1, -0.75), (2, -0.75)]


def test_rows_name_the_files_of_their_pictures_in_the_prompts_order(written):
    rows = [json.loads(line) for line in (written / "val_000005.jsonl").read_text().splitlines()]
    shown = {row["uid"]: row.get("pictures") for row in rows}
    assert shown[2] is None  # a prompt without pictures
    red, wide = (np.asarray(Image.open(written / path)) for path in (shown[0][0], shown[1][0]))
    assert shown[1][1] == shown[0][0] != shown[1][2]
    assert red.shape == (30, 40, 3)
    assert (red == (255, 0, 0)).all()
    assert wide.shape == (171, 512, 3)  # a third as high as wide, as the picture
    assert "base64" not in (written / "val_000005.jsonl").read_text()


def test_the_page_shows_a_prompts_pictures_in_one_section_with_its_responses(written):
    assert not (written / "val_000005.md").exists()
    page = (written / "val_000005.html").read_text()
    sections = [part.partition("</section>")[0] for part in page.split("<section>")[1:]]
    assert [len(re.findall("<img ", section)) for section in sections] == [1, 3, 0]
    for path in re.findall('<img src="([^"]+)"', page):
        assert (written / path).is_file()
    responses = [re.findall("<pre class=(.*?)>(.*?)</pre>", section) for section in sections]
    assert responses == [[("wrong", "a &lt; 4"), ("right", "4")], [("right", "4 &amp; done")], [("wrong", "7")]]
    assert re.findall(r", accuracy (\d), (\d+) tokens, stop\n", page) == [
        ("0", "2"),
        ("1", "2"),
        ("1", "2"),
        ("0", "2"),
    ]
    assert "question 0 <tag>" in unescape(sections[0])
    assert "<tag>" not in page


def test_rollouts_of_text_are_a_page_of_text_and_leave_no_pictures(tmp_path):
    write_rollouts(tmp_path, "train_000001", SEEN[2:], keep=8)
    assert {path.name for path in tmp_path.iterdir()} == {"train_000001.jsonl", "train_000001.md"}
    assert "question 2 <tag>" in (tmp_path / "train_000001.md").read_text()
    assert "pictures" not in json.loads((tmp_path / "train_000001.jsonl").read_text())
