from dapo_mcore.prompts.dataset import PromptSet, build_prompts
from dapo_mcore.prompts.source import PromptSource
from dapo_mcore.prompts.tokenizer import load_tokenizer

__all__ = ["PromptSet", "PromptSource", "build_prompts", "load_tokenizer"]
