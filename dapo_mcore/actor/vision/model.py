"""The policy that sees: one decoder, with a vision tower on its first stage."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dapo_mcore.actor.packing import MicroBatch
from dapo_mcore.actor.policy_model import PolicyModel
from dapo_mcore.actor.vision.deepstack import DeepstackLayer
from dapo_mcore.actor.vision.features import ImageFeatures
from dapo_mcore.actor.vision.inputs import VisionInputs
from dapo_mcore.actor.vision.positions import InterleavedRope
from dapo_mcore.actor.vision.tower import build_tower
from dapo_mcore.config import VisionConfig


class VisionPolicyModel(PolicyModel):
    """One pipeline chunk. Visual tokens are told by their places: an image's placeholder that was sampled is text."""

    def __init__(
        self,
        *args: Any,
        rope: InterleavedRope,
        tower: PreTrainedModel | None,
        split_images: bool,
        **kwargs: Any,
    ) -> None:
        # Features go into the whole embedding; it is cut over sequence parallel ranks afterwards.
        super().__init__(*args, position_embedding_type="mrope", scatter_embedding_sequence_parallel=False, **kwargs)
        self.rotary_pos_emb = rope
        self.visual = tower
        ranks = parallel_state.get_tensor_and_context_parallel_group() if split_images else None
        self.features = None if tower is None else ImageFeatures(tower, ranks)

    def share_tower(self, other: VisionPolicyModel) -> None:
        """See with the tower of `other`, and what it has seen; if neither is trained and both are the same."""
        own, others = self.features, other.features
        if own is None or others is None or own.is_trained or others.is_trained:
            return
        weights = zip(own.tower.parameters(), others.tower.parameters(), strict=True)
        if all(torch.equal(mine, its) for mine, its in weights):
            self.visual, self.features = None, others

    def forget_images(self) -> None:
        if self.features is not None:
            self.features.forget()

    def _inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        vision = micro_batch.vision
        inputs = super()._inputs(micro_batch) | {"position_ids": vision.positions[:, None]}
        if self.pre_process:
            hidden, context = self._embedded(micro_batch.input_ids, vision)
            inputs |= {"decoder_input": hidden, "extra_block_kwargs": {"context": context}}
        return inputs

    def _embedded(self, input_ids: Tensor, vision: VisionInputs) -> tuple[Tensor, Tensor | None]:
        """The decoder's input [T, 1, hidden] and what its layers add [T, 1, levels, hidden], if there is an image.

        Under sequence parallelism this rank's part of both.
        """
        hidden, context = self.embedding(input_ids=input_ids, position_ids=None), None
        assert self.features is not None
        # A trained tower takes part in the backward pass of every micro-batch: ranks, and gradients that are reduced
        # while it runs, wait for it.
        if vision.images or (torch.is_grad_enabled() and self.features.is_trained):
            features = self.features(vision.images, vision.sizes)[vision.features]
            tokens = vision.positions.shape[1]
            dense = features.new_zeros(tokens, *features.shape[1:]).index_copy(0, vision.where, features)
            is_visual = torch.zeros(tokens, dtype=torch.bool, device=hidden.device).index_fill(0, vision.where, True)
            dense, is_visual = dense[vision.held][:, None], is_visual[vision.held][:, None, None]
            hidden, context = torch.where(is_visual, dense[:, :, 0], hidden), dense[:, :, 1:].contiguous()
        if self.config.sequence_parallel:
            scatter = tensor_parallel.scatter_to_sequence_parallel_region
            hidden, context = scatter(hidden), None if context is None else scatter(context)
        return hidden, context


def vision_chunk(
    hf: PretrainedConfig,
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    vision: VisionConfig,
    **options: Any,
) -> VisionPolicyModel:
    """ValueError if the first pipeline stage does not hold all layers to which features are added."""
    levels = len(hf.vision_config.deepstack_visual_indexes)
    layers = spec.layer_specs or []
    if options["pre_process"] and len(layers) < levels:
        raise ValueError(
            f"actor.megatron.pipeline_model_parallel_size={config.pipeline_model_parallel_size}: the first chunk of "
            f"the model has {len(layers)} layers, and the vision tower's features are added to the first {levels}; "
            "use fewer stages or virtual stages"
        )
    for layer in layers:
        layer.module = DeepstackLayer
    rope = hf.text_config.rope_parameters
    recomputes = config.recompute_granularity == "full"
    has_tower = options["pre_process"]
    return VisionPolicyModel(
        config,
        spec,
        rope=InterleavedRope(config.kv_channels, rope["rope_theta"], config.mrope_section),
        tower=build_tower(hf.vision_config, config.params_dtype, vision.train, recomputes) if has_tower else None,
        split_images=vision.split_images,
        **options,
    )
