"""Tiny Qwen3-VL-MoE folders for an engine, prompts with pictures, and what transformers says about the responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from dapo_mcore.prompts.problem import Problem
from dapo_mcore.prompts.vision import PLACEHOLDER, ImageTokens, load_image_tokens
from dapo_mcore.rollout.engine import Request, request_seed
from dapo_mcore.types import EncodedImage, Prompt, Response
from tests.tiny_vl import IMAGE, KINDS, MERGE, PATCH, VOCAB, save_published, tiny_vl

EOS, START, END, VIDEO, TWIN = 0, 10, 11, 12, 13  # TWIN: text that is embedded as the placeholder is
SPECIAL = {EOS: "<eos>", IMAGE: PLACEHOLDER, START: "<|vision_start|>", END: "<|vision_end|>", VIDEO: "<|video_pad|>"}
CELL = PATCH * MERGE  # pixels of a token's side
MIN_PIXELS, MODELS_MAX, MAX_PIXELS = 4 * CELL**2, 64 * CELL**2, 12 * CELL**2  # the last as data.max_pixels
PROMPT_LENGTH, RESPONSE_LENGTH = 150, 24
LENGTHS = {"max_prompt_length": PROMPT_LENGTH, "max_response_length": RESPONSE_LENGTH}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word per token."""
    words = {SPECIAL.get(token, f"t{token}"): token for token in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[EOS], pad_token=SPECIAL[EOS])


def processor() -> Qwen3VLProcessor:
    limits = {"min_pixels": MIN_PIXELS, "max_pixels": MODELS_MAX}
    images = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, **limits)
    return Qwen3VLProcessor(images, tokenizer(), Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=MERGE))


def vl_policy(tower: int = 0, decoder: int = 0, model_type: str = "qwen3_vl_moe") -> transformers.PreTrainedModel:
    """In fp32. Another number for one of the parts gives that part other weights."""
    model: Any = tiny_vl(model_type)
    with torch.no_grad():
        parts = ((model.model.visual, tower), (model.model.language_model, decoder), (model.lm_head, decoder))
        for part, seed in parts:
            draw = torch.Generator().manual_seed(seed)
            for parameter in part.parameters() if seed else ():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        embedding = model.get_input_embeddings().weight
        embedding[TWIN] = embedding[IMAGE]
        model.lm_head.weight[IMAGE] *= 2.0  # the policy samples the placeholder now and then
    return model


def save_vl_policy(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """As it is published, with its processor."""
    processor().save_pretrained(folder)
    save_published(model, folder)
    file, kind = folder / "config.json", KINDS[model.config.model_type][0]
    stated = json.loads(file.read_text())
    stated |= {"architectures": [f"{kind}ForConditionalGeneration"], "eos_token_id": EOS, "video_token_id": VIDEO}
    stated |= {"vision_start_token_id": START, "vision_end_token_id": END}
    stated["text_config"] |= {"norm_topk_prob": True, "eos_token_id": EOS}
    stated["text_config"]["rope_parameters"] |= {"mrope_interleaved": True}  # vLLM takes its absence for chunks
    file.write_text(json.dumps(stated))
    return folder


def image_tokens(folder: Path, max_pixels: int = MAX_PIXELS) -> ImageTokens:
    counted = load_image_tokens(str(folder), tokenizer(), max_pixels)
    assert counted is not None
    return counted


def picture(width: int, height: int, seed: int) -> EncodedImage:
    """Noise."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return EncodedImage(file.getvalue(), width, height)


def prompt_of(vision: ImageTokens, uid: int, *images: EncodedImage, length: int = 12) -> Prompt:
    """Random text, and the pictures in it."""
    draw = torch.Generator().manual_seed(uid)
    text = torch.randint(TWIN + 1, VOCAB, (len(images) + 1, length), generator=draw).tolist()
    ids = [*text[0]]
    for words in text[1:]:
        ids += [START, IMAGE, END, *words]
    message = {"role": "user", "content": "<image>" * len(images)}
    spans = vision.spans(Problem(uid, f"row {uid}", (message,), "", {}, images), ids)
    return Prompt(uid, uid, tuple(ids), "", "", images=images, visual_spans=spans)


def some_prompts(vision: ImageTokens) -> list[Prompt]:
    """Text; a picture that is small enough, one that is not, both of them; the same picture twice."""
    small, large, wide = picture(24, 16, 1), picture(61, 47, 2), picture(90, 20, 3)
    return [
        prompt_of(vision, 0),
        prompt_of(vision, 1, small),
        prompt_of(vision, 2, large),
        prompt_of(vision, 3, wide, large, length=40),  # above the 128 tokens that the prefix cache counts in
        prompt_of(vision, 4, small, small),
    ]


def requests_of(prompts: Sequence[Prompt], n: int) -> list[Request]:
    return [Request(prompt, i, request_seed(7, 0, prompt.uid, i)) for prompt in prompts for i in range(n)]


@torch.no_grad()
def read(model: Any, prompt: Prompt, response: Response) -> torch.Tensor:
    """[response, vocabulary]: transformers' logits at the response's tokens, by its own processor."""
    images: dict[str, Any] = {}
    ids = list(prompt.token_ids)
    if prompt.images:
        size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
        text = processor().tokenizer.decode(ids)
        pictures = [Image.open(BytesIO(image.data)).convert("RGB") for image in prompt.images]
        made = processor()(text=[text], images=pictures, images_kwargs={"size": size}, return_tensors="pt")
        images = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        ids = made["input_ids"][0].tolist()
    whole = torch.tensor([[*ids, *(TWIN if token == IMAGE else token for token in response.token_ids)]])
    return model(whole[:, :-1], mm_token_type_ids=(whole[:, :-1] == IMAGE).int(), **images).logits[0, len(ids) - 1 :]


def response_logprobs(model: Any, prompt: Prompt, response: Response) -> torch.Tensor:
    """[response] float64, at temperature 1."""
    logprobs = read(model, prompt, response).double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]


def chosen_experts(model: Any, prompt: Prompt, response: Response) -> dict[int, torch.Tensor]:
    """Layer -> [tokens read, top_k]: of transformers' routers, sorted."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, given, output, number=number: found.update({number: output[2].sort(-1).values})
        )
        for number, layer in enumerate(model.model.language_model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    read(model, prompt, response)
    for hook in hooks:
        hook.remove()
    return found


def gap(model: Any, requests: Sequence[Request], responses: Sequence[Response]) -> float:
    """Largest difference, in nats, between the reported log-probabilities and those of transformers."""
    return max(
        (response_logprobs(model, request.prompt, response) - torch.tensor(response.logprobs)).abs().max().item()
        for request, response in zip(requests, responses, strict=True)
    )
