"""What a tiny vision-language model has beside its decoder: a tower, pixels, and tokens for pictures and text."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BEFORE, IMAGE, VIDEO, BEHIND = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
SPECIAL = (PAD, TURN, END, BEFORE, IMAGE, VIDEO, BEHIND)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = 264  # of the model: 256 bytes and what is special, rounded up
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PATCH, MERGE = 16, 2  # pixels of a patch's side, patches of a visual token's side: as published
LIMITS = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}  # pixels of a resized picture: 4 to 64 tokens
TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH,
    "spatial_merge_size": MERGE, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip
# The width is neither the experts' nor twice that: transformers tells transposed matrices by their shapes.
TEXT = {
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024, "moe_intermediate_size": 48,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
    },
}  # fmt: skip


def token_id(token: str) -> int:
    """Of a special token: they follow the bytes."""
    return len(BYTES) + SPECIAL.index(token)


IDS: dict[str, Any] = {
    "image_token_id": token_id(IMAGE), "video_token_id": token_id(VIDEO),
    "vision_start_token_id": token_id(BEFORE), "vision_end_token_id": token_id(BEHIND),
}  # fmt: skip


def build_processor() -> Qwen3VLProcessor:
    """With a tokenizer of one token per UTF-8 byte."""
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(BYTES)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "size": LIMITS}
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen3VLVideoProcessor(**sizes)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
