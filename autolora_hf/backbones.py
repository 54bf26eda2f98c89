"""Backbones: from a checkpoint name to a model, and from a model to a record that rebuilds it."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
)

from .inputs import (
    check_classifier,
    library_of,
    native_size,
    num_classes_of,
    problem_at,
    size_holder,
    written,
    wrong_size_message,
)
from .pixels import size_pair


logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
# Backbones that the package ships, by the name `get_autolora_model` takes.
SHIPPED = {"quickstart": ASSETS / "quickstart"}


def load_backbone(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    library: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Creates the image classifier that `name` stands for.

    Args:
        name (`str`): `"quickstart"` (shipped with the package), a timm model (`"resnet50"`, `"resnet50.a1_in1k"`,
            `"hf-hub:org/name"`, `"local-dir:..."`), a local directory or a Hub repository of either library.
        num_classes (`int`, *optional*): Number of classes; a head of another size is created afresh. `None`: as saved.
        pretrained (`bool`): Load the weights, not only the architecture.
        image_size (`int` or `tuple[int, int]`, *optional*): Size of the images it shall take. A network that is built
            for one size is built for this one, and timm resamples its position embeddings. `None`: as saved.
        library (`str`, *optional*): `"transformers"` loads a timm checkpoint into transformers' wrapper.
        revision (`str`, *optional*), token (*optional*): Passed on to the Hub.

    Raises:
        ValueError: If nothing by that name is known, the message suggests the nearest timm names; or if the network
            cannot take images of that size.
    """
    size = None if image_size is None else size_pair(image_size)
    if name in SHIPPED:
        return _load_timm(f"local-dir:{SHIPPED[name]}", num_classes, pretrained, size)
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return _load_timm(name, num_classes, pretrained, size)
    if timm.is_model(name):
        return _load_timm(name, num_classes, pretrained, size)
    if os.path.isdir(name):
        source, saved = name, read_json(Path(name) / "config.json")
    elif "/" in name and not name.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            saved = read_json(Path(hf_hub_download(name, "config.json", revision=revision, token=token)))
        except Exception as error:
            raise OSError(
                f"The Hub repository {name!r} has no readable config.json ({error}). Check the name, your network "
                "and, for a private or gated repository, your token."
            ) from error
        source = name
    else:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"Unknown checkpoint {name!r}: not a timm model, not a directory, not a Hub name 'org/name'."
            + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    # What transformers' wrapper saved names its own class; timm may not be able to read it.
    if "architecture" in saved and saved.get("model_type") != "timm_wrapper" and library != "transformers":
        prefix = "local-dir" if os.path.isdir(source) else "hf-hub"
        suffix = f"@{revision}" if revision and prefix == "hf-hub" else ""
        return _load_timm(f"{prefix}:{source}{suffix}", num_classes, pretrained, size)
    return _load_transformers(source, num_classes, pretrained, size, revision=revision or "main", token=token)


def _load_timm(name: str, num_classes: int | None, pretrained: bool, size: tuple[int, int] | None) -> nn.Module:
    changes = {} if num_classes is None else {"num_classes": num_classes}
    options = [{}] if size is None else _timm_options(name, size)
    for option in options:
        try:
            return timm.create_model(name, pretrained=pretrained, **changes, **option)
        except Exception as error:
            if option and "size mismatch" in str(error):
                # timm does not resample the position embeddings of every model; some then still run as they are.
                problem = error
                continue
            if not timm.is_model(name):
                raise
            raise OSError(
                f"The pretrained weights of timm's {name!r} could not be loaded ({error}). Without a network, pass a "
                "model created from local weights, or a local directory."
            ) from error
    with torch.device("meta"):
        native = native_size(timm.create_model(name))
    raise ValueError(
        f"The weights of {name!r} are for images of {written(native)} pixels only: timm does not adapt those of this "
        f"architecture to {written(size)}. Leave out `image_size`."
    ) from problem


def _timm_options(name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Ways to create a timm model so that it takes images of `size`, best one first, tried without weights."""
    with torch.device("meta"):
        model = timm.create_model(name)
    if size == native_size(model):
        return [{}]
    options = []
    if getattr(model, "_traits", {}).get("fixed_input_size", model.pretrained_cfg.get("fixed_input_size")):
        try:
            with torch.device("meta"):
                resized = timm.create_model(name, img_size=size)
            if problem_at(resized, size) is None:
                options.append({"img_size": size})
        except Exception as error:  # such as sizes that the patches do not divide
            logger.debug("%s cannot be created with img_size=%s: %s", name, size, error)
    problem = problem_at(model, size)
    if problem is None:
        options.append({})
    if not options:
        raise ValueError(wrong_size_message(model, size, problem))
    return options


def _load_transformers(
    source: str, num_classes: int | None, pretrained: bool, size: tuple[int, int] | None, **options: Any
) -> nn.Module:
    changes = {} if num_classes is None else {"num_labels": num_classes}
    config = AutoConfig.from_pretrained(source, **changes, **options)
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm writes it here too, and the wrapper would pass it twice.
        config.model_args.pop("num_classes", None)
    if size is not None:
        config = _config_of_size(config, size, pretrained)
    if not pretrained:
        return AutoModelForImageClassification.from_config(_with_class(config))
    # Only safetensors: a pickle from the Hub could run code.
    return AutoModelForImageClassification.from_pretrained(
        source, config=config, use_safetensors=True, ignore_mismatched_sizes=num_classes is not None, **options
    )


def _with_class(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, of which the auto class can read which class it stands for (some have several)."""
    config.architectures = config.architectures or []
    return config


def _config_of_size(config: PreTrainedConfig, size: tuple[int, int], pretrained: bool) -> PreTrainedConfig:
    """`config` for a network that takes images of `size` and into which the weights of `config` fit."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(_with_class(config))
    check_classifier(model)
    other = []
    if size != native_size(model):
        try:
            resized_config = _resized(config, size)
            with torch.device("meta"):
                resized = AutoModelForImageClassification.from_config(resized_config)
            if problem_at(resized, size) is None:
                ours, theirs = _shapes(resized), _shapes(model)
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


def label_names_of(model: nn.Module) -> list[str] | None:
    """Class names that the checkpoint carries, in class order, or `None` if it has only placeholders."""
    if library_of(model) == "timm":
        names = model.pretrained_cfg.get("label_names")
        return list(names) if names and len(names) == model.num_classes else None
    labels = model.config.id2label or {}  # PVT's configuration has none
    names = [labels[index] for index in range(len(labels))]
    return names if len(names) == num_classes_of(model) and names[0] != "LABEL_0" else None


def describe_backbone(
    model: nn.Module,
    name: str | None,
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A JSON record of where the backbone came from and how to build its architecture again.

    `config` is `None` when the architecture cannot be rebuilt from its name and arguments (layers were replaced by
    hand): loading then needs the model itself. `image_size` is what [`load_backbone`] was called with, and `resampled`
    the tensors that were resampled for it.
    """
    library = library_of(model)
    record: dict[str, Any] = {"library": library, "name_or_path": name, "revision": revision, "config": None}
    if library == "timm":
        record["architecture"] = model.pretrained_cfg["architecture"]
        record["config"] = _timm_config(model)
    else:
        record["architecture"] = type(model).__name__
        record["name_or_path"] = name or model.name_or_path or None
        record["config"] = json.loads(model.config.to_json_string(use_diff=True))
    if name is not None and image_size is not None:
        record["image_size"] = list(size_pair(image_size))
        with torch.device("meta"):
            original = load_backbone(name, num_classes_of(model), pretrained=False, revision=revision, library=library)
        shapes = _shapes(original)
        record["resampled"] = sorted(key for key, shape in _shapes(model).items() if shapes.get(key) != shape)
    try:
        rebuilt = rebuild_backbone(record)
    except Exception:
        rebuilt = None
    # The printed structure covers what shapes do not: strides, paddings, epsilons, kinds of pooling.
    if rebuilt is None or repr(rebuilt) != repr(model) or _shapes(rebuilt) != _shapes(model):
        record["config"] = None
    return record


def rebuild_backbone(record: dict[str, Any], device: str = "meta") -> nn.Module:
    """The architecture of a record of [`describe_backbone`], without weights."""
    if record["config"] is None:
        raise ValueError(
            f"The {record['architecture']} of this adapter was changed by hand, so it cannot be built from its name: "
            "pass the model as `base_model=`."
        )
    with torch.device(device):
        if record["library"] == "transformers":
            # A copy, since some classes change what they read.
            saved = copy.deepcopy(record["config"])
            config = CONFIG_MAPPING[saved["model_type"]].from_dict(saved)
            # Some configurations stand for several classes.
            config.architectures = [record["architecture"]]
            return AutoModelForImageClassification.from_config(config)
        config = record["config"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            return timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=config["num_classes"])


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of `tensors`, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file; `FileNotFoundError` or `ValueError` that name it when it is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _timm_config(model: nn.Module) -> dict[str, Any] | None:
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            save_config_for_hf(model, str(path))
        except ValueError:  # an argument of the model is not JSON
            return None
        config = json.loads(path.read_text())
    # timm writes the number of classes twice, and transformers' wrapper then fails to load the checkpoint.
    config.get("model_args", {}).pop("num_classes", None)
    return config


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
