import base64
import random
from io import BytesIO

import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from pyarrow import parquet

from dapo_mcore.config import DataConfig, SourceConfig
from dapo_mcore.prompts.dataset import build_prompts, fingerprint
from dapo_mcore.prompts.images import ImageColumn
from dapo_mcore.prompts.problem import problem_from
from dapo_mcore.prompts.readers import read_problems
from dapo_mcore.types import EncodedImage, Prompt

NAME = "data.train"
COLUMN = ImageColumn("images", max_pixels=100 * 100)


def drawn(size=(40, 30), shade=0, kind="PNG") -> bytes:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).rectangle((5, 5, 20, 15), fill=(shade, 200, 100))
    file = BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def read(file, column=COLUMN, **options):
    return read_problems(SourceConfig(files=[str(file)], **options), NAME, column)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def write_parquet(tmp_path):
    def write(*rows: dict):
        parquet.write_table(pa.Table.from_pylist(list(rows)), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    return write


def test_rows_of_geometry3k_are_read_as_they_are(write_parquet):
    first, second = drawn(), drawn((20, 50))
    file = write_parquet(
        {"images": [{"bytes": first, "path": None}], "problem": "<image>Find $x$.", "answer": r"2 \sqrt { 221 }"},
        {"images": [{"bytes": second, "path": "a.png"}], "problem": "<image>Find $y$.", "answer": "5"},
    )
    problems = read(file, prompt_key="problem")
    assert [p.images for p in problems] == [(EncodedImage(first, 40, 30),), (EncodedImage(second, 20, 50),)]
    assert [p.answer for p in problems] == [r"2 \sqrt { 221 }", "5"]
    assert problems[0].metadata == {"answer": r"2 \sqrt { 221 }"}


def test_rows_that_verl_has_prepared_are_read_as_they_are(write_parquet):
    file = write_parquet(
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": "<image>Find $x$. Think first."}],
            "images": [{"bytes": drawn(), "path": None}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"index": 3, "split": "train"},
        }
    )
    (problem,) = read(file, answer_key="reward_model.ground_truth")
    assert (problem.answer, problem.images) == ("7", (EncodedImage(drawn(), 40, 30),))
    assert problem.metadata["extra_info"]["index"] == 3


def test_a_picture_is_bytes_a_path_beside_the_data_both_or_base64(jsonl, write_parquet, tmp_path):
    data = drawn()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(data)
    path, encoded = "pictures/a.png", base64_of(data)
    values = [path, str(tmp_path / path), {"path": path}, {"bytes": None, "path": path}, {"bytes": encoded}]
    rows = [{"prompt": "<image>", "answer": "1", "images": value} for value in [*values, *([v] for v in values)]]
    raw = write_parquet({"prompt": "<image>", "answer": "1", "images": data})
    for problem in (*read(jsonl(*rows)), *read(raw)):
        assert problem.images == (EncodedImage(data, 40, 30),)


def test_a_decoded_picture_is_kept_pixel_by_pixel(tmp_path):
    picture = Image.open(BytesIO(drawn()))
    row = {"prompt": "<image>", "answer": "1", "images": [picture]}
    problem = COLUMN.add(problem_from(row, 0, "row 1", SourceConfig(), None), row, tmp_path)
    assert problem.images[0].decode().tobytes() == picture.tobytes()


def test_several_pictures_stand_in_the_order_of_their_marks(jsonl, tmp_path):
    for name, shade in (("a.png", 10), ("b.jpg", 90)):
        (tmp_path / name).write_bytes(drawn(shade=shade, kind="JPEG" if name.endswith("jpg") else "PNG"))
    row = {"prompt": "Is <image> like <image>?", "answer": "no", "images": ["b.jpg", "a.png"]}
    (problem,) = read(jsonl(row))
    assert [image.data for image in problem.images] == [(tmp_path / n).read_bytes() for n in ("b.jpg", "a.png")]


@pytest.mark.parametrize("row", [{}, {"images": None}, {"images": []}])
def test_rows_without_pictures_are_text(jsonl, row):
    (problem,) = read(jsonl({"prompt": "1+1?", "answer": "2", **row}))
    assert problem.images == ()


def test_marks_are_plain_text_where_no_column_of_pictures_is_named_or_there(jsonl):
    rows = jsonl({"prompt": "What does <image> or <video> mean?", "answer": "a tag", "pictures": ["x"]})
    assert read(rows)[0].images == read(rows, ImageColumn("", 0))[0].images == ()


def test_what_is_transparent_is_white():
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((0, 0), (10, 20, 30, 255))
    file = BytesIO()
    picture.save(file, "PNG")
    decoded = EncodedImage(file.getvalue(), 2, 1).decode()
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


GOOD = drawn()
JPEG = drawn((90, 90), kind="JPEG")
FAULTS = [
    ({"images": [{"bytes": base64_of(b"no picture")}]}, "a picture that cannot be read: not one of PNG, JPEG"),
    ({"images": [{"bytes": base64_of(GOOD[:-30])}]}, "a picture that breaks off or is damaged"),
    ({"images": [{"bytes": base64_of(JPEG[: len(JPEG) * 9 // 10])}]}, "a picture that breaks off or is damaged"),
    ({"images": [{"bytes": "a!bcd"}]}, "neither bytes nor base64"),
    ({"images": [{"bytes": base64_of(GOOD)}] * 2}, "1 times <image> in the prompt, but 2 pictures in data.image_key"),
    ({"images": []}, "1 times <image> in the prompt, but 0 pictures"),
    ({"images": ["gone.png"]}, "picture 'gone.png' cannot be read (No such file or directory); paths are relative"),
    ({"images": ["https://somewhere/a.png"]}, "named by a URL, and none is downloaded"),
    ({"images": [3]}, "a picture is a int, not bytes, a path"),
    ({"images": [{}]}, "a picture is a dict, not bytes, a path"),
    ({"images": [{"bytes": base64_of(drawn((101, 100)))}]}, "101 x 100 pixels is above data.max_pixels=10000"),
    ({"images": [{"bytes": base64_of(GOOD)}], "videos": ["a.mp4"]}, "column videos holds a video"),
    ({"prompt": "<video> Who?", "videos": ["a.mp4"]}, "column videos holds a video"),
    ({"prompt": "<image> <video>", "images": [{"bytes": base64_of(GOOD)}]}, "<video> in the prompt; only pictures"),
]


@pytest.mark.parametrize(("changes", "fault"), FAULTS)
def test_a_row_with_a_picture_that_cannot_be_used_is_refused_by_file_and_number(jsonl, changes, fault):
    good = {
        "prompt": "<image>?",
        "answer": "1",
        "images": [{"bytes": base64_of(drawn((100, 100)))}],
    }  # as many as may be
    file = jsonl(good, {"prompt": "<image>?", "answer": "1", **changes}, good)
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used") as error:
        read(file)
    assert f"{file}: row 2: " in str(error.value)
    assert fault in str(error.value)
    assert "data.image_key" in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about the damage
def test_no_damage_to_a_picture_raises_anything_but_its_rows_fault(jsonl):
    rng = random.Random(0)
    rows = []
    for data in (GOOD, JPEG, drawn(kind="GIF"), drawn(kind="WEBP"), drawn(kind="TIFF")):
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            rows.append({"prompt": "<image>", "answer": "1", "images": [{"bytes": base64_of(bytes(broken))}]})
    with pytest.raises(ValueError, match="of 300 rows cannot be used"):
        read(jsonl(*rows))


def test_the_same_question_about_another_picture_is_another_problem(jsonl):
    rows = [{"prompt": "<image>", "answer": "1", "images": [{"bytes": base64_of(drawn(shade=s))}]} for s in (1, 2, 1)]
    one, other, same = (problem.question for problem in read(jsonl(*rows)))
    assert one == same != other


def test_the_fingerprint_knows_the_pictures():
    def of(*images: bytes) -> str:
        return fingerprint([Prompt(0, 0, (1,), "", "a", images=tuple(EncodedImage(data, 1, 1) for data in images))])

    assert of() == fingerprint([Prompt(0, 0, (1,), "", "a")])
    assert len({of(), of(b"a"), of(b"b"), of(b"a", b"b")}) == 4


def test_pictures_are_refused_for_a_model_of_text_unless_they_are_left_out(jsonl, tokenizer):
    source = SourceConfig(files=[jsonl(
        {"prompt": "1+1?", "answer": "2", "images": []},
        {"prompt": "<image>?", "answer": "1", "images": [{"bytes": base64_of(GOOD)}]},
    )])  # fmt: skip
    with pytest.raises(
        ValueError, match=r"data.train: 1 of 2 rows have pictures \(the first: .*row 2\).*vision_config"
    ):
        build_prompts(source, DataConfig(), tokenizer, NAME)
    assert len(build_prompts(source, DataConfig(image_key=""), tokenizer, NAME)) == 2


def test_a_prompt_with_pictures_prints_without_their_bytes():
    assert len(repr(EncodedImage(GOOD, 40, 30))) < 60
