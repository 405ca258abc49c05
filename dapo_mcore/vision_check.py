"""Refuses vision-language models, and layouts of them, that this project does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.config import MegatronConfig, TowerTraining, VisionConfig
from dapo_mcore.layout_check import PIPELINE, VIRTUAL
from dapo_mcore.refuse import refuse

FAMILIES = ("qwen3_vl", "qwen3_vl_moe")


def sees(model: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a vision-language model."""
    return "vision_config" in model


def decoder_of(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the decoder of text."""
    return model["text_config"] if sees(model) else model


def check_vision(path: str, megatron: MegatronConfig, model: Mapping[str, Any]) -> None:
    """What the config.json of the vision-language model in `path` says; ValueError."""
    if model.get("model_type") not in FAMILIES:
        refuse("model.path", path, f"model_type={model.get('model_type')} sees images, and those that see are "
               f"{' and '.join(FAMILIES)}", "give one of these, or a model of text")  # fmt: skip
    rope = decoder_of(model).get("rope_parameters") or decoder_of(model).get("rope_scaling") or {}
    if not rope.get("mrope_interleaved"):
        refuse("model.path", path, "its config.json does not say mrope_interleaved, and the engine would take the "
               "sections of the rotary embedding in one piece each",
               'put "mrope_interleaved": true into rope_parameters of its text_config')  # fmt: skip
    stages, chunks = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size
    levels = len(model["vision_config"].get("deepstack_visual_indexes", ()))
    layers = decoder_of(model).get("num_hidden_layers", 0) // stages
    option, value = (PIPELINE, stages) if layers < levels else (VIRTUAL, chunks)
    if layers // chunks < levels:
        refuse(option, value, f"leaves {layers // chunks} layers to the first chunk of the model, and the vision "
               f"tower's features are added to the first {levels}", "use fewer stages")  # fmt: skip


def check_no_tower(vision: VisionConfig, model: Mapping[str, Any]) -> None:
    """ValueError for options of a vision tower, which a model of text does not have."""
    reason, way_out = f"{model.get('model_type')} has no vision tower", "leave it out"
    if vision.train is not TowerTraining.frozen:
        refuse("actor.vision.train", vision.train.name, reason, way_out)
    if vision.split_images:
        refuse("actor.vision.split_images", True, reason, way_out)
