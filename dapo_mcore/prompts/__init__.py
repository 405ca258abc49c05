from dapo_mcore.prompts.dataset import PromptSet, build_prompts
from dapo_mcore.prompts.pixels import pixels_under
from dapo_mcore.prompts.source import PromptSource
from dapo_mcore.prompts.tokenizer import load_tokenizer
from dapo_mcore.prompts.vision import load_image_tokens

__all__ = ["PromptSet", "PromptSource", "build_prompts", "load_image_tokens", "load_tokenizer", "pixels_under"]
