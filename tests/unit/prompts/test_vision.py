"""Tokens of pictures against those that the processor of transformers makes of the same pictures."""

import json
from io import BytesIO
from random import Random

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from dapo_mcore.config import DataConfig, SourceConfig, Truncation
from dapo_mcore.prompts.dataset import build_prompts
from dapo_mcore.prompts.pixels import pixels_under
from dapo_mcore.prompts.vision import PLACEHOLDER, load_image_tokens
from dapo_mcore.types import EncodedImage, Prompt, VisualSpan, expand

NAME = "data.train"
TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}\
{% endif %}{{ '\n' }}{% endfor %}<assistant>"""
MIN_PIXELS, MAX_PIXELS = 4_096, 65_536
LIMITS = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
SIZES = [(64, 64), (320, 200), (757, 463), (30, 300), (33, 31), (48, 80), (1, 7), (180, 180)]


@pytest.fixture(scope="module")
def vl_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", PLACEHOLDER, "<|vision_end|>"]})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video_pad|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def processor(vl_tokenizer):
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, min_pixels=MIN_PIXELS, max_pixels=1 << 24)
    return Qwen3VLProcessor(images, vl_tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)


@pytest.fixture
def model(tmp_path, processor, vl_tokenizer):
    """A folder like that of a Qwen3-VL model, without weights."""
    processor.save_pretrained(tmp_path)
    config = {"model_type": "qwen3_vl_moe", "vision_config": {}}
    config["image_token_id"] = vl_tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def source(tmp_path):
    """Rows with the given texts, whose pictures have the given sizes."""

    def make(*rows: tuple[str, list[tuple[int, int]]]) -> SourceConfig:
        lines = []
        for text, sizes in rows:
            names = [f"{width}x{height}.png" for width, height in sizes]
            for name, size in zip(names, sizes, strict=True):
                Image.new("RGB", size, "gray").save(tmp_path / name)
            lines.append(json.dumps({"prompt": text, "answer": "1", "images": names}))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return SourceConfig(files=[str(tmp_path / "rows.jsonl")])

    return make


def tokens_of(model, tokenizer, max_pixels=MAX_PIXELS):
    vision = load_image_tokens(str(model), tokenizer, max_pixels)
    assert vision is not None
    return vision


def test_placeholders_expand_to_the_tokens_and_grids_of_the_processor(model, source, processor, vl_tokenizer):
    data = DataConfig(max_pixels=1_000_000, max_prompt_length=10_000)
    rows = [("Is <image> like <image>, or <image>?", SIZES[i : i + 3]) for i in range(len(SIZES) - 2)]
    vision = tokens_of(model, vl_tokenizer)
    built = build_prompts(source(*rows, ("1+1?", [])), data, vl_tokenizer, NAME, vision=vision)
    assert built.prompts[-1].expanded_ids == built.prompts[-1].token_ids
    for prompt in built.prompts[:-1]:
        assert prompt.token_ids.count(vision.placeholder) == len(prompt.images) == 3
        pictures = [image.decode() for image in prompt.images]
        theirs = processor(text=[prompt.text], images=pictures, images_kwargs={"size": LIMITS})
        assert list(prompt.expanded_ids) == theirs["input_ids"][0]
        assert [[1, 2 * s.rows, 2 * s.columns] for s in prompt.visual_spans] == theirs["image_grid_thw"].tolist()
        inside = [i for span in prompt.visual_spans for i in range(span.start, span.start + span.num_tokens)]
        assert inside == [i for i, kind in enumerate(theirs["mm_token_type_ids"][0]) if kind == 1]


def picture_with_noise(size: tuple[int, int], mode: str) -> EncodedImage:
    width, height = size
    channels = Image.frombytes(mode, size, Random(f"{size}{mode}").randbytes(width * height * len(mode)))
    file = BytesIO()
    channels.save(file, "PNG")
    return EncodedImage(file.getvalue(), width, height)


@pytest.mark.parametrize("max_pixels", [MAX_PIXELS, 20_000])
def test_pixels_are_those_that_the_processor_of_transformers_makes_of_all_pictures_together(
    model, processor, max_pixels
):
    images = [picture_with_noise(size, mode) for size in SIZES for mode in ("RGB", "RGBA")]
    limits = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
    pictures = [image.decode() for image in images]
    theirs = processor(text=["<|image_pad|>" * len(images)], images=pictures, images_kwargs={"size": limits})
    pixels_of = pixels_under(str(model), max_pixels)
    assert torch.equal(torch.cat([pixels_of(image) for image in images]), torch.as_tensor(theirs["pixel_values"]))
    assert pixels_of(images[0]).dtype == torch.float32


def test_expansion_counts_positions_in_the_result():
    assert expand((7, 9, 8, 9), (VisualSpan(1, 1, 2), VisualSpan(4, 2, 2))) == (7, 9, 9, 8, 9, 9, 9, 9)
    assert expand((7, 9), ()) == (7, 9)
    prompt = Prompt(0, 0, (7, 9, 8, 9), "", "", visual_spans=(VisualSpan(1, 1, 2), VisualSpan(4, 2, 2)))
    assert prompt.length == len(prompt.expanded_ids) == 8


def test_the_instruction_and_the_text_around_pictures_stay_where_they_are(model, source, vl_tokenizer):
    data = DataConfig(instruction="Box it.")
    vision = tokens_of(model, vl_tokenizer)
    (prompt,) = build_prompts(source(("A<image> B", [(64, 64)])), data, vl_tokenizer, NAME, vision=vision).prompts
    assert prompt.text == "<user>A<|vision_start|><|image_pad|><|vision_end|> B Box it.\n<assistant>"


def test_overlong_prompts_are_those_whose_text_and_pictures_together_are(model, source, vl_tokenizer):
    rows = [("<image>", [(64, 64)]), ("<image>", [(256, 256)])]  # 2 x 2 and 8 x 8 tokens
    vision = tokens_of(model, vl_tokenizer)
    text = len("<user>\n<assistant>") + 2
    data = DataConfig(max_prompt_length=text + 63)
    built = build_prompts(source(*rows), data, vl_tokenizer, NAME, vision=vision)
    assert [prompt.visual_spans for prompt in built.prompts] == [(VisualSpan(7, 2, 2),)]
    assert built.counts.overlong == 1
    assert (
        len(build_prompts(source(*rows), DataConfig(max_prompt_length=text + 64), vl_tokenizer, NAME, vision=vision))
        == 2
    )


@pytest.mark.parametrize("truncation", list(Truncation))
def test_a_prompt_with_pictures_is_never_cut(model, source, vl_tokenizer, truncation):
    data = DataConfig(max_prompt_length=30, filter_overlong_prompts=False, truncation=truncation)
    vision = tokens_of(model, vl_tokenizer)
    with pytest.raises(ValueError, match=r"1 prompts are longer.*row 2.*a prompt with pictures is never cut"):
        build_prompts(source(("a", []), ("<image>", [(256, 256)])), data, vl_tokenizer, NAME, vision=vision)


@pytest.mark.parametrize(
    ("text", "sizes", "fault"),
    [
        (f"<image> {PLACEHOLDER}", [(64, 64)], "row 1 has 1 pictures, .* 1 times <image> .* 2 times <.image_pad.>"),
        (f"no picture {PLACEHOLDER}", [], "row 1 has 0 pictures, .* 0 times <image> .* 1 times <.image_pad.>"),
        ("<image>", [(1, 300)], "row 1 has a picture of 1 x 300 pixels, .*aspect ratio.*crop it"),
    ],
)
def test_rows_that_the_model_would_read_otherwise_are_refused(model, source, vl_tokenizer, text, sizes, fault):
    with pytest.raises(ValueError, match=fault):
        build_prompts(source((text, sizes)), DataConfig(), vl_tokenizer, NAME, vision=tokens_of(model, vl_tokenizer))


def test_a_mark_without_a_column_of_pictures_is_refused(model, jsonl, vl_tokenizer):
    source = SourceConfig(files=[jsonl({"prompt": "<image>Find $x$.", "answer": "1", "image": "a.png"})])
    with pytest.raises(ValueError, match=r"data\.image_key: .*row 1 has 0 pictures, .* 1 times <image>"):
        build_prompts(source, DataConfig(), vl_tokenizer, NAME, vision=tokens_of(model, vl_tokenizer))


def test_pictures_need_a_chat_template(model, source, vl_tokenizer):
    data = DataConfig(apply_chat_template=False)
    with pytest.raises(ValueError, match=r"data.apply_chat_template=False: .*row 1 has pictures.*set it to true"):
        build_prompts(source(("<image>", [(64, 64)])), data, vl_tokenizer, NAME, vision=tokens_of(model, vl_tokenizer))


def test_a_text_model_has_no_tokens_for_pictures(tmp_path, vl_tokenizer):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert load_image_tokens(str(tmp_path), vl_tokenizer, MAX_PIXELS) is None


def without_processor(model):
    (model / "processor_config.json").unlink()


def with_processor_of_clip(model):
    without_processor(model)
    (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))


def with_config(**changes):
    def change(model):
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without_processor, "no image processor in it .*copy preprocessor_config.json"),
        (with_processor_of_clip, "image processor CLIPImageProcessor; known is Qwen2VLImageProcessor"),
        (with_config(image_token_id=3), r"as token \d+, config.json says image_token_id=3"),
    ],
)
def test_a_model_folder_that_cannot_count_pictures_is_refused(model, vl_tokenizer, change, fault):
    change(model)
    with pytest.raises(ValueError, match=f"model.path=.*{fault}"):
        load_image_tokens(str(model), vl_tokenizer, MAX_PIXELS)


def test_a_limit_below_the_processors_smallest_picture_is_refused(model, vl_tokenizer):
    with pytest.raises(ValueError, match=r"data.max_pixels=1000: below the 4096 pixels.*raise it"):
        load_image_tokens(str(model), vl_tokenizer, 1_000)
    assert tokens_of(model, vl_tokenizer, MIN_PIXELS).max_pixels == MIN_PIXELS
