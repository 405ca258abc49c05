"""Features of the vision tower's blocks, added in the decoder's first layers (DeepStack, arXiv:2406.04334)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackLayer(TransformerLayer):
    """A decoder layer to whose output its level of `context` is added.

    `context`, [tokens, 1, levels, hidden], 0 at text, is Megatron's argument for cross-attention, which a decoder
    has no use for; it is handed on through recomputation, so that gradients need no hooks.
    """

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, _ = super().forward(*args, **kwargs)
        if context is None:
            return hidden, None
        level = self.layer_number - 1
        is_last = level + 1 == context.shape[2]
        return hidden + context[:, :, level], None if is_last else context
