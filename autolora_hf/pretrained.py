"""Networks of transformers: of a checkpoint, of a configuration, for images of another size."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

from .checks import listed
from .inputs import check_classifier, native_size, problem_at, size_holder, written, wrong_size_message
from .towers import saved_tower, tower_config


logger = logging.getLogger(__name__)


def load_pretrained(
    source: str, num_classes: int | None, pretrained: bool, size: tuple[int, int] | None, tower: str | None = None
) -> nn.Module:
    """The image classifier or image tower in a folder, with its weights or without.

    Args:
        source (`str`): The folder.
        num_classes (`int`, *optional*), pretrained (`bool`), size (`tuple[int, int]`, *optional*): As in
            [`load_backbone`].
        tower (`str`, *optional*): Name of the checkpoint, for messages, if its image tower is asked for.

    Raises:
        ValueError: If there is no such network, it does not take images of that size, or weights are missing.
    """
    config = read_config(source)
    if tower is not None:
        config = tower_config(config, tower)
    kind = saved_tower(config)
    if kind is None and num_classes is not None:
        config = read_config(source, num_labels=num_classes)
    if kind is not None and num_classes not in (None, getattr(config, kind.width)):
        raise ValueError(
            f"This {kind.name} is an image tower: it gives embeddings of {getattr(config, kind.width)} values and "
            f"cannot have {num_classes} classes. Leave `num_classes` out for an objective without labels ('fare'); "
            "to classify, take a checkpoint of the whole image-text model or of a classifier."
        )
    if size is not None:
        config = _config_of_size(config, size, pretrained)
    if not pretrained:
        return from_config(config)
    # Only safetensors: a pickle from the Hub could run code.
    options = {"config": config, "use_safetensors": True}
    if kind is None:
        return AutoModelForImageClassification.from_pretrained(
            source, **options, trust_remote_code=False, ignore_mismatched_sizes=num_classes is not None
        )
    with _without_report():
        model, found = cast(Any, kind.cls).from_pretrained(source, **options, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"The checkpoint has no weights for {listed(sorted(found['missing_keys']))} of {kind.name}, which would "
            "be drawn at random."
        )
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers from listing every tensor of the text half, which is not wanted, as unexpected."""
    report = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    report.addFilter(is_other)
    try:
        yield
    finally:
        report.removeFilter(is_other)


def from_config(config: PreTrainedConfig) -> nn.Module:
    """The network of a configuration, without its weights."""
    tower = saved_tower(config)
    if tower is not None:
        return tower.cls._from_config(config)
    return AutoModelForImageClassification.from_config(_with_class(config))


def read_config(source: str, **options: Any) -> PreTrainedConfig:
    """The configuration in a folder."""
    # Said outright, since transformers asks the user otherwise.
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm writes it here too, and the wrapper would pass it twice.
        config.model_args.pop("num_classes", None)
    return config


def _with_class(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, of which the auto class can read which class it stands for (some have several)."""
    config.architectures = config.architectures or []
    return config


def _config_of_size(config: PreTrainedConfig, size: tuple[int, int], pretrained: bool) -> PreTrainedConfig:
    """`config` for a network that takes images of `size` and into which the weights of `config` fit."""
    with torch.device("meta"):
        model = from_config(config)
    check_classifier(model)
    other = []
    if size != native_size(model):
        try:
            resized_config = _resized(config, size)
            with torch.device("meta"):
                resized = from_config(resized_config)
            if problem_at(resized, size) is None:
                ours, theirs = shapes_of(resized), shapes_of(model)
                other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
                if not other or not pretrained:
                    return resized_config
        except Exception as error:  # such as sizes that the patches do not divide
            logger.debug("%s cannot be configured for %s: %s", type(model).__name__, size, error)
    problem = problem_at(model, size)
    if problem is None:
        return config
    if other:
        raise ValueError(
            f"The weights of this {type(model).__name__} are for images of {written(native_size(model))} pixels, "
            f"and transformers does not adapt {', '.join(other[:3])} to {written(size)}. Leave out `image_size`, or "
            "take the same checkpoint from timm, which adapts it."
        )
    raise ValueError(wrong_size_message(model, size, problem))


def _resized(config: PreTrainedConfig, size: tuple[int, int]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    holder = size_holder(config)
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "img_size": list(size)}
    elif holder is not None:
        holder.image_size = size[0] if size[0] == size[1] and isinstance(holder.image_size, int) else list(size)
    return config


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of its parameters and buffers, by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
