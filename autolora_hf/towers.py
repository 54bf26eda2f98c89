"""Image towers: the image halves of image-text models of transformers, which give embeddings instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Tower:
    """A class of transformers that gives one embedding an image.

    Args:
        name (`str`): Its name.
        width (`str`): Field of its configuration with D, the size of the embedding.
        whole (`str`): Model type of the image-text model that it is a half of.
        aligned (`bool`): Whether its embeddings are in the space of the text half's: what a checkpoint of the whole
            model is opened as.
    """

    name: str
    width: str
    whole: str
    aligned: bool = True

    @property
    def cls(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.name)


# Each gives its embedding as `image_embeds`, or as `pooler_output` where there is no projection.
TOWERS = {
    tower.name: tower
    for tower in (
        Tower("CLIPVisionModelWithProjection", "projection_dim", "clip"),
        Tower("CLIPVisionModel", "hidden_size", "clip", aligned=False),
        Tower("MetaClip2VisionModelWithProjection", "projection_dim", "metaclip_2"),
        Tower("MetaClip2VisionModel", "hidden_size", "metaclip_2", aligned=False),
        Tower("SiglipVisionModel", "hidden_size", "siglip"),
    )
}


def tower_of(model: nn.Module) -> Tower | None:
    """What kind of image tower `model`, or the base of a PEFT model, is; `None` if it is none."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    return TOWERS.get(type(network).__name__) if isinstance(network, PreTrainedModel) else None


def is_recorded_tower(record: dict[str, Any]) -> bool:
    """Whether a record of [`describe_backbone`] is of an image tower."""
    return record["library"] == "transformers" and record["architecture"] in TOWERS


def saved_tower(config: PreTrainedConfig) -> Tower | None:
    """The tower that a configuration says it is of; `None` if it is of another network."""
    for name in config.architectures or ():
        tower = TOWERS.get(name)
        if tower is not None and cast(Any, tower.cls.config_class).model_type == config.model_type:
            return tower
    return None


def tower_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The configuration of the image tower of a checkpoint: its own, or that of the image half of the whole model.

    Args:
        config (`PreTrainedConfig`): Of the checkpoint.
        name (`str`): What messages call it.

    Raises:
        ValueError: If there is no such tower.
    """
    if saved_tower(config) is not None:
        return config
    half = getattr(config, "vision_config", None)
    for tower in TOWERS.values():
        if tower.aligned and half is not None and tower.whole == config.model_type:
            half.architectures = [tower.name]
            return half
    raise ValueError(f"{name} is no image tower but {_kind(config)}. {advice()}")


def advice() -> str:
    """For messages: what an image tower is."""
    return (
        "An image tower gives embeddings, not classes: a checkpoint of CLIP, SigLIP or MetaCLIP 2, whole or its image "
        f"half alone ({', '.join(TOWERS)})."
    )


def _kind(config: Any) -> str:
    architectures = getattr(config, "architectures", None) or [f"a model of type {config.model_type!r}"]
    return str(architectures[0])
