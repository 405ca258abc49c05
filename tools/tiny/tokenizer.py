"""A word-level tokenizer of 29 tokens for sums of single digits, as a fast tokenizer that vLLM loads, too."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
QUESTION = ("State", " the", " final", " answer", " to", " following", " arithmetic", " problem", ":", " ")
SUM = (*"0123456789-", " + ", " - ", " =", "; ", "<answer>", "</answer>")
TOKENS = (PAD, EOS, *QUESTION, *SUM)
VOCAB_SIZE = 32  # of the model: embeddings and head are cut over ranks, so a round number


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Decoding gives the text back exactly. A character outside the vocabulary becomes the padding token."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=PAD))
    pieces = Regex(r"</?answer>| [+-] | =|; | ?[A-Za-z]+|.")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
