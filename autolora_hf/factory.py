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

from . import backbones, branches, inputs, saving, targets
from .attacks.pgd import attack_mode, forget_cached, logits_of
from .config import AutoLoraConfig, ThreatModel
from .consistency import check_branches
from .digests import backbone_digest
from .fingerprint import check_fingerprint
from .heads import check_heads, resolve_heads
from .modeling import AutoLoraModel
from .pixels import Preprocessing, size_pair
from .routes import NATURAL, ROBUST
from .towers import is_recorded_tower, tower_of


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
    tower: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AutoLoraModel:
    """Makes a model with a robust route and, unless the configuration leaves it out, a natural one.

    At the start every route computes what the backbone computes. The model is changed in place, as `get_peft_model`
    does.

    Args:
        model (`nn.Module` or `str`): A timm model, an image classifier or image tower of transformers, or a checkpoint
            name: `"quickstart"`, `"resnet50"`, `"hf-hub:org/name"`, `"org/name"`, a local directory. An image tower,
            such as CLIP's, has embeddings N x D in the place of logits, and its projection in that of the
            classification layer.
        config (`AutoLoraConfig`, *optional*): Defaults to the paper's setting.
        num_classes (`int`, *optional*): For a name: number of classes; a head of another size is created afresh.
        preprocessing (`Preprocessing`, *optional*): Overrides what the checkpoint says.
        image_size (`int` or `tuple[int, int]`, *optional*): Side, or height and width, to which images are resized. A
            network of one fixed size that is given by name is built for it, where its architecture allows that.
        label_names (`list[str]`, *optional*): Class names in class order, saved with the model.
        threat_model (`ThreatModel`, *optional*): Defaults to Linf with eps = 8/255; the trainer sets its own.
        tower (`bool`): For the name of a whole image-text model: take its image tower. Otherwise a classifier is made
            of it.
        revision (`str`, *optional*), token (*optional*): For a Hub name.

    Raises:
        ValueError: If the architecture cannot have two exact routes; the message names the layers and what to pass.
    """
    if config is not None and not isinstance(config, AutoLoraConfig):
        raise TypeError(f"`config` must be an AutoLoraConfig, got {type(config).__name__}.")
    name = model if isinstance(model, str) else None
    if isinstance(model, str):
        model = backbones.load_backbone(
            model, num_classes, image_size=image_size, tower=tower, revision=revision, token=token
        )
    elif num_classes is not None and num_classes != backbones.num_classes_of(model):
        raise ValueError(
            f"`num_classes={num_classes}`, but the model has {backbones.num_classes_of(model)} classes. Create the "
            "model with the right number: `num_classes` only applies to checkpoint names."
        )
    if isinstance(model, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model already carries adapters: merge or unload them first.")
    inputs.check_classifier(model)
    if label_names is not None and tower_of(model) is not None:
        raise ValueError(f"A {type(model).__name__} gives embeddings, so there are no classes to name.")
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
            found = resolve_heads(model, example)
            config.head = found[0] if len(found) == 1 else found
        else:
            check_heads(model, config.heads, example)
    uses = targets.watch_layers(model, example)
    config.target_modules = branches.choose_targets(model, config, uses)
    modules = dict(model.named_modules())
    if config.branch != "lora":
        # PEFT may refuse a layer, which is better said before the model has changed.
        branches.count_values(config, {name: modules[name] for name in config.target_modules})
    stock_layers = frozenset(name for name, use in uses.items() if targets.in_stock_peft(modules[name], use))
    config.modules_to_save = targets.requested_modules(model, config)
    backbone = backbones.describe_backbone(model, name, revision, image_size, token)
    backbone["weights_sha256"] = backbone_digest(model.state_dict(), config.heads, backbone)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.mode == "full" and not trainable:
        raise ValueError(
            "Every parameter of the model is frozen, so the robust route could not learn anything: call "
            "`model.requires_grad_(True)`, or use `AutoLoraConfig(mode='adapter')`, which trains an adapter on it."
        )
    hidden = targets.hidden_head_layers(model, config.heads, config.target_modules)
    if config.mode == "adapter" and hidden and tower_of(model) is None:
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
        if adapted.adapters:
            # The natural branch sits on top of the robust one.
            last = NATURAL if NATURAL in adapted.adapters else ROBUST
            with torch.enable_grad(), _eval(adapted), adapted.route(last):
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
    """Raises `ValueError` unless every route still computes what the backbone does."""
    for route in reversed(model.routes):
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
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> AutoLoraModel:
    """Loads a model that [`AutoLoraModel.save_pretrained`] wrote, from a folder or from the Hub, in eval mode.

    Nothing from a repository is executed: only JSON and safetensors files are read, and they are checked before memory
    is spent on them. A warning tells if the backbone has other weights than the one the adapter was trained on, or if
    the model does not compute what it did when it was saved.

    Args:
        name_or_path (`str`): Local folder or Hub repository.
        route (`str`): Route that a plain forward runs: `"robust"` (deployed) or `"natural"`.
        base_model (`nn.Module` or `str`, *optional*): The backbone of a `mode="adapter"` model. `None`: the checkpoint
            the adapter was trained on.
        revision (`str`, *optional*): Branch, tag or commit of the Hub repository.
        token (`str` or `bool`, *optional*): Token for a private or gated one; `None`: the one you are logged in with.
        cache_dir (`str`, *optional*): Another cache than huggingface-hub's usual one.
        local_files_only (`bool`): Use what is in the cache, without looking on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder, repository or revision, or files are missing.
        PermissionError: If the repository is gated.
        ValueError: If files are damaged, hostile or belong to another model; nothing partial is loaded.
    """
    directory, record = saving.fetch(
        name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    if base_model is None and record.mode == "full":
        base_model = saving.rebuild(directory, record)
    elif base_model is None:
        base_model = record.backbone["name_or_path"]
        if base_model is None:
            raise ValueError(
                f"{name_or_path} is an adapter of a {record.backbone['architecture']} that was created in memory, "
                "so its weights cannot be found by name: pass the model as `base_model=`."
            )
    # The recorded commit is one of the recorded repository.
    is_recorded = isinstance(base_model, str) and base_model == record.backbone["name_or_path"]
    commit = record.backbone["revision"] if is_recorded else None
    source = base_model if isinstance(base_model, str) else None
    if isinstance(base_model, str):
        size, library = record.backbone.get("image_size"), record.backbone["library"]
        base_model = backbones.load_backbone(
            base_model,
            record.num_classes,
            image_size=size,
            library=library,
            tower=is_recorded_tower(record.backbone),
            revision=commit,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    classes = backbones.num_classes_of(base_model)
    if classes != record.num_classes:
        raise ValueError(
            f"The saved model has {record.num_classes} classes but the base model has {classes}. Create the base "
            f"model with {record.num_classes} classes."
        )
    check_branches(base_model, record, directory)
    config = record.autolora_config()
    digest = backbone_digest(base_model.state_dict(), config.heads, record.backbone)
    model = get_autolora_model(
        base_model,
        config,
        preprocessing=record.preprocessing,
        label_names=record.label_names,
        threat_model=record.threat_model,
    )
    same_base = record.mode == "full" or digest == record.backbone["weights_sha256"]
    if not same_base:
        logger.warning(
            "The adapter %s was trained on other weights than this base model has (their SHA-256 differ), so its "
            "robust accuracy does not hold here. It was trained on %s (%s): pass that as `base_model=`.",
            name_or_path,
            record.backbone["name_or_path"] or "an unnamed model",
            record.backbone["architecture"],
        )
    model.load_weights(directory)
    origin = record.backbone if same_base else {**model.backbone, "name_or_path": source, "revision": commit}
    model.backbone.update(origin)
    if same_base:
        # Figures belong to this base.
        model.results, model.training_plan = record.results, record.training
        check_fingerprint(model, record, name_or_path)
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
