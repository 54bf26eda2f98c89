"""What a model takes: which library it is of, whether it takes RGB images, of what size, prepared how."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .attacks.pgd import attack_mode, is_embedding, logits_of
from .pixels import Preprocessing, size_pair
from .towers import TOWERS, tower_of


logger = logging.getLogger(__name__)

# Image classifiers of transformers, by model type, whose input is not an RGB image that an attack could change.
_OTHER_INPUTS = {
    "imagegpt": "it reads an image as a sequence of colour-cluster numbers, which have no gradient to attack.",
    "shieldgemma2": "it classifies images together with a text prompt, and this package trains on images alone.",
    "siglip2": (
        "it takes patches cut by its processor, with a mask, instead of images. The checkpoints named 'siglip2' of "
        "one fixed image size (such as siglip2-base-patch16-224) are of class SiglipForImageClassification and work."
    ),
}


def library_of(model: nn.Module) -> str:
    """`"timm"` or `"transformers"`; raises `TypeError` for anything else."""
    if isinstance(model, PreTrainedModel):
        return "transformers"
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    raise TypeError(
        "Expected a timm model, an image classifier or image tower of transformers or a checkpoint name, got "
        f"{type(model).__name__}."
    )


def timm_part(model: nn.Module) -> nn.Module | None:
    """The timm network that `model` is or that transformers' wrapper holds; `None` for other models."""
    if library_of(model) == "timm":
        return model
    return cast(nn.Module, model.timm_model) if model.config.model_type == "timm_wrapper" else None


def num_classes_of(model: nn.Module) -> int:
    """K, the number of logits; of an image tower D, the size of its embeddings."""
    tower = tower_of(model)
    if tower is not None:
        return getattr(model.config, tower.width)
    return cast(Any, model).num_classes if library_of(model) == "timm" else cast(Any, model).config.num_labels


def check_classifier(model: nn.Module) -> None:
    """Raises unless `model` classifies RGB images, or is an image tower; the message says what stands in the way.

    Raises:
        TypeError: If it is a model of neither library.
        ValueError: If its input is not an RGB image, or it has no classifier.
    """
    kind = type(model).__name__
    if library_of(model) == "transformers" and model.config.model_type in _OTHER_INPUTS:
        raise ValueError(f"{kind} is not supported: {_OTHER_INPUTS[model.config.model_type]}")
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        half = next((t.name for t in TOWERS.values() if t.whole == model.config.model_type and t.aligned), None)
        raise ValueError(
            f"{kind} takes images together with texts."
            + (f" Pass its image half alone: `{half}.from_pretrained(...)` of the same checkpoint." if half else "")
        )
    if not num_classes_of(model):
        raise ValueError(
            f"This {kind} has no classifier (0 classes). Say how many classes it shall tell apart: "
            "`timm.create_model(name, num_classes=...)`, `from_pretrained(name, num_labels=...)`, or "
            "`get_autolora_model(name, num_classes=...)` for a checkpoint name."
        )
    channels = _channels(model)
    if channels not in (3, None):
        raise ValueError(
            f"This {kind} takes images of {channels} channel{'s' * (channels != 1)}; only models of RGB images "
            "(3 channels) are supported. Create it with 3: grey images are converted to RGB."
        )


def _channels(model: nn.Module) -> int | None:
    """Number of channels of the images a model takes, if it says so."""
    network: Any = timm_part(model)
    if network is not None:
        return getattr(network, "in_chans", None) or network.pretrained_cfg["input_size"][0]
    config: Any = model.config
    for part in (config, getattr(config, "vision_config", None)):
        if getattr(part, "num_channels", None) is not None:
            return part.num_channels
    return None


def check_runs(model: nn.Module, example: Tensor) -> None:
    """Runs `model` once and raises `ValueError` unless it gives logits; the message tells a wrong image size.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        example (`Tensor`): One normalised image, 1 x 3 x H x W.
    """
    problem = problem_at(model, tuple(example.shape[-2:]))
    if problem is not None:
        hint = (
            " Where the architecture allows it, `timm.create_model(name, img_size=...)` or "
            "`get_autolora_model(name, image_size=...)` makes it for another size."
        )
        raise ValueError(wrong_size_message(model, tuple(example.shape[-2:]), problem, hint)) from problem


def problem_at(model: nn.Module, size: tuple[int, int]) -> Exception | None:
    """What goes wrong when `model` classifies an image of `size`; `None` if nothing does."""
    reference = next(model.parameters())
    example = torch.zeros(1, 3, *size, device=reference.device, dtype=reference.dtype)
    try:
        with attack_mode(model), torch.no_grad():
            output = model(example)
    except Exception as error:
        return error
    try:
        # An encoder without a classifier has embeddings too, of which nothing is known.
        logits = output.logits if is_embedding(output) and tower_of(model) is None else logits_of(output)
    except AttributeError:
        if isinstance(output, tuple):
            return TypeError(
                f"it returns a tuple of {len(output)} instead of logits: create it without auxiliary classifiers, as "
                "with `aux_logits=False`"
            )
        return TypeError(f"it returns {type(output).__name__}, which has no logits: it is not an image classifier")
    classes = num_classes_of(model)
    if logits is None:
        return TypeError("it gives no embedding of the whole image: create it with its pooling head")
    if classes and tuple(logits.shape) != (1, classes):
        counter = "model.num_classes" if library_of(model) == "timm" else "model.config.num_labels"
        return ValueError(
            f"it returns a tensor of shape {tuple(logits.shape)} for one image, but `{counter}` is {classes}. If you "
            "replaced the classifier, set that number too"
        )
    return None


def wrong_size_message(model: nn.Module, size: tuple[int, int], problem: Exception, hint: str = "") -> str:
    """The message for a model that fails with `problem` on images of `size`; with `hint` if it takes one size."""
    kind, cause = type(model).__name__, " ".join(f"{type(problem).__name__}: {problem}".split()).rstrip(" :.")
    network, native = timm_part(model), native_size(model)
    if native in (None, size) or problem_at(model, native) is not None:
        return f"{kind} cannot classify an image of {written(size)} pixels ({cause})."
    fixed = network is None or getattr(network, "_traits", {}).get("fixed_input_size", True)
    if library_of(model) == "timm" and fixed:
        return f"{kind} takes only images of {written(native)} pixels, not {written(size)} ({cause}).{hint}"
    return (
        f"{kind} does not run on images of {written(size)} pixels ({cause}). It does on {written(native)}: leave "
        "out `image_size`, or choose another one."
    )


def native_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a model says it is for."""
    network = timm_part(model)
    return configured_size(model.config) if network is None else Preprocessing.from_timm(network).image_size


def written(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


def resolve_preprocessing(
    model: nn.Module,
    name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Preprocessing:
    """What the checkpoint expects of an image: timm's `pretrained_cfg`, or the image processor of transformers.

    A transformers model that was built in memory has no saved processor; its class's default one is taken then, with a
    warning, since checkpoints of one class may differ in mean and standard deviation. Where the processor and the
    network disagree about the image size, it is one that the network takes.

    Raises:
        ValueError: If the model does not classify RGB images.
    """
    check_classifier(model)
    network = timm_part(model)
    if network is not None:
        return Preprocessing.from_timm(
            network, getattr(model.config, "pretrained_cfg", None) if network is not model else None
        )
    configured = configured_size(model.config)
    source = name or model.name_or_path
    if source:
        try:
            processor = AutoImageProcessor.from_pretrained(
                source, revision=revision or "main", token=token, trust_remote_code=False
            )
        except (OSError, ValueError) as error:  # no processor was saved with the checkpoint
            logger.warning("The image processor of %s could not be loaded (%s).", source, error)
        else:
            found = _read_processor(processor, configured)
            return replace(found, image_size=_size_that_runs(model, found.image_size, configured))
    tower = tower_of(model)
    config_class = type(model.config) if tower is None else CONFIG_MAPPING[tower.whole]
    processors = IMAGE_PROCESSOR_MAPPING.get(config_class, None)
    found = _read_processor(next(iter(processors.values()))() if processors else None, configured)
    found = replace(found, image_size=_size_that_runs(model, configured, found.image_size))
    logger.warning(
        "%s has no saved image processor; assuming %s (mean %s, std %s, %s pixels). Pass "
        "`preprocessing=Preprocessing(...)` if the checkpoint was trained otherwise.",
        type(model).__name__,
        "its class's default" if processors else "that of ImageNet models",
        found.mean,
        found.std,
        written(found.image_size),
    )
    return found


def _read_processor(processor: Any, configured: tuple[int, int] | None) -> Preprocessing:
    if processor is None:
        return Preprocessing.assumed(None, configured)
    try:
        return Preprocessing.from_image_processor(processor)
    except ValueError as error:
        assumed = Preprocessing.assumed(processor, configured)
        logger.warning(
            "%s Taking its mean, standard deviation and filter, with a plain resize to %s pixels.",
            error,
            written(assumed.image_size),
        )
        return assumed


def _size_that_runs(model: nn.Module, *sizes: tuple[int, int] | None) -> tuple[int, int]:
    """The first of `sizes` on which `model` runs; the first one if it runs on none, or if they are all the same."""
    known = list(dict.fromkeys(size for size in sizes if size is not None))
    if len(known) == 1:
        return known[0]
    return next((size for size in known if problem_at(model, size) is None), known[0])


def size_holder(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The part of a configuration that has `image_size`: CLIP's is that of its vision tower."""
    parts = [config, getattr(config, "vision_config", None)]
    return next((part for part in parts if getattr(part, "image_size", None) is not None), None)


def configured_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    holder = size_holder(config)
    return None if holder is None else size_pair(holder.image_size)
