"""Making and loading an [`AutoLoraModel`]."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import backbones, inputs, saving, targets
from .attacks.pgd import attack_mode, forget_cached, logits_of
from .config import AutoLoraConfig, ThreatModel
from .modeling import AutoLoraModel
from .pixels import Preprocessing, size_pair
from .routes import NATURAL, ROBUST


logger = logging.getLogger(__name__)


def get_autolora_model(
    model: nn.Module | str,
    config: AutoLoraConfig | None = None,
    *,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    image_size: int | tuple[int, int] | None = None,
    label_names: list[str] | None = None,
    threat_model: ThreatModel | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AutoLoraModel:
    """Makes a model with a robust and a natural route.

    At the start both routes compute what the backbone computes. The model is changed in place, as `get_peft_model`
    does.

    Args:
        model (`nn.Module` or `str`): A timm model, a transformers image classifier, or a checkpoint name:
            `"quickstart"`, `"resnet50"`, `"hf-hub:org/name"`, `"org/name"`, a local directory.
        config (`AutoLoraConfig`, *optional*): Defaults to the paper's setting.
        num_classes (`int`, *optional*): For a name: number of classes; a head of another size is created afresh.
        preprocessing (`Preprocessing`, *optional*): Overrides what the checkpoint says.
        image_size (`int` or `tuple[int, int]`, *optional*): Side, or height and width, to which images are resized. A
            network of one fixed size that is given by name is built for it, where its architecture allows that.
        label_names (`list[str]`, *optional*): Class names in class order, saved with the model.
        threat_model (`ThreatModel`, *optional*): Defaults to Linf with eps = 8/255; the trainer sets its own.
        revision (`str`, *optional*), token (*optional*): For a Hub name.

    Raises:
        ValueError: If the architecture cannot have two exact routes; the message names the layers and what to pass.
    """
    if config is not None and not isinstance(config, AutoLoraConfig):
        raise TypeError(f"`config` must be an AutoLoraConfig, got {type(config).__name__}.")
    name = model if isinstance(model, str) else None
    if name is not None:
        model = backbones.load_backbone(name, num_classes, image_size=image_size, revision=revision, token=token)
    elif num_classes is not None and num_classes != backbones.num_classes_of(model):
        raise ValueError(
            f"`num_classes={num_classes}`, but the model has {backbones.num_classes_of(model)} classes. Create the "
            "model with the right number: `num_classes` only applies to checkpoint names."
        )
    if isinstance(model, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model already carries adapters: merge or unload them first.")
    inputs.check_classifier(model)
    if label_names is not None and len(label_names) != backbones.num_classes_of(model):
        raise ValueError(f"{len(label_names)} label names for a model of {backbones.num_classes_of(model)} classes.")
    preprocessing = preprocessing or inputs.resolve_preprocessing(model, name, revision=revision, token=token)
    if image_size is not None:
        preprocessing = dataclasses.replace(preprocessing, image_size=size_pair(image_size))
    config = copy.deepcopy(config or AutoLoraConfig())

    reference = next(model.parameters())
    example = torch.zeros(1, 3, *preprocessing.image_size, device=reference.device, dtype=reference.dtype)
    inputs.check_runs(model, example)
    with attack_mode(model):
        if config.head is None:
            heads = targets.resolve_heads(model, example)
            config.head = heads[0] if len(heads) == 1 else heads
        else:
            targets.check_heads(model, config.heads, example)
    uses = targets.watch_layers(model, example)
    if config.target_modules in (None, "all"):
        stock_only = config.target_modules is None and config.mode == "adapter"
        config.target_modules = targets.resolve_targets(model, config.heads, uses, stock_only=stock_only)
    else:
        config.target_modules = targets.requested_targets(model, config.target_modules, config.heads, uses)
    modules = dict(model.named_modules())
    stock_layers = frozenset(name for name, use in uses.items() if targets.in_stock_peft(modules[name], use))
    backbone = backbones.describe_backbone(model, name, revision, image_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.mode == "full" and not trainable:
        raise ValueError(
            "Every parameter of the model is frozen, so the robust route could not learn anything: call "
            "`model.requires_grad_(True)`, or use `AutoLoraConfig(mode='adapter')`, which trains an adapter on it."
        )
    hidden = targets.hidden_head_layers(model, config.heads, config.target_modules)
    if config.mode == "adapter" and hidden:
        logger.warning(
            "%s stays frozen in mode 'adapter', though it belongs to the classifier. If it was made afresh for your "
            "classes, train it too: `AutoLoraConfig(head=%r)`.",
            ", ".join(hidden),
            [*hidden, *config.heads],
        )
    with attack_mode(model), torch.no_grad():
        expected = logits_of(model(example))
    adapted = AutoLoraModel(
        model,
        config,
        preprocessing=preprocessing,
        backbone=backbone,
        stock_layers=stock_layers,
        label_names=label_names or backbones.label_names_of(model),
        threat_model=threat_model,
    )
    try:
        with torch.enable_grad(), _eval(adapted), adapted.route(NATURAL):
            targets.check_alive(adapted, example)
        if config.init_lora_weights is not False:
            _check_start(adapted, example, expected)
    except ValueError:
        # Give the caller's model back as it was.
        adapted._unwrap(keep_saved=False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    return adapted


@torch.no_grad()
def _check_start(model: AutoLoraModel, example: Tensor, expected: Tensor) -> None:
    """Raises `ValueError` unless both routes still compute what the backbone does."""
    for route in (NATURAL, ROBUST):
        with _eval(model), model.route(route):
            found = logits_of(model(example))
        scale = expected.abs().max().clamp(min=1)
        if not torch.allclose(found / scale, expected / scale, rtol=0, atol=1e-2, equal_nan=True):
            raise ValueError(
                f"This model cannot have two exact routes: at the start its {route} route computes something else "
                "than the model itself. It does more with its layers than to call them or to read their weights; pass "
                "the layers that it uses plainly as `AutoLoraConfig(target_modules=[...])`."
            )


def load_autolora_model(
    name_or_path: str | os.PathLike,
    route: str = ROBUST,
    *,
    base_model: nn.Module | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AutoLoraModel:
    """Loads a model that [`AutoLoraModel.save_pretrained`] wrote, from a folder or from the Hub, in eval mode.

    Args:
        name_or_path (`str`): Local folder or Hub repository.
        route (`str`): Route that a plain forward runs: `"robust"` (deployed) or `"natural"`.
        base_model (`nn.Module` or `str`, *optional*): The backbone of a `mode="adapter"` model. `None`: the checkpoint
            the adapter was trained on.
        revision (`str`, *optional*), token (*optional*): For a Hub repository.

    Raises:
        FileNotFoundError: If there is no such folder or files are missing.
        ValueError: If files are damaged or belong to another model; nothing partial is loaded.
    """
    directory = saving.resolve_directory(name_or_path, revision=revision, token=token)
    record = saving.read_record(directory)
    config = AutoLoraConfig(**record["config"])
    if base_model is None and config.mode == "full":
        base_model = backbones.rebuild_backbone(record["backbone"], device="cpu")
    elif base_model is None:
        base_model = record["backbone"]["name_or_path"]
        if base_model is None:
            raise ValueError(
                f"{name_or_path} is an adapter of a {record['backbone']['architecture']} that was created in memory, "
                "so its weights cannot be found by name: pass the model as `base_model=`."
            )
    name = base_model if isinstance(base_model, str) else record["backbone"]["name_or_path"]
    if isinstance(base_model, str):
        base_model = backbones.load_backbone(
            base_model,
            record["num_classes"],
            image_size=record["backbone"].get("image_size"),
            library=record["backbone"]["library"],
            revision=record["backbone"]["revision"],
            token=token,
        )
    saving.check_backbone(base_model, record)
    model = get_autolora_model(
        base_model,
        config,
        preprocessing=Preprocessing(**record["preprocessing"]),
        label_names=record["label_names"],
        threat_model=ThreatModel(**record["threat_model"]),
    )
    origin = ("revision", "image_size", "resampled")
    model.backbone.update(
        {key: record["backbone"][key] for key in origin if key in record["backbone"]}, name_or_path=name
    )
    model.load_weights(directory)
    model._switch.rest_in(route)
    return model.eval()


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        forget_cached(model)
        for module, training in modes:
            module.training = training
