"""Backbones: from a checkpoint name to a model, and from a model to a record that rebuilds it."""

from __future__ import annotations

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
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .pixels import Preprocessing


logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
# Backbones that the package ships, by the name `get_autolora_model` takes.
SHIPPED = {"quickstart": ASSETS / "quickstart"}


def load_backbone(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Creates the image classifier that `name` stands for.

    Args:
        name (`str`): `"quickstart"` (shipped with the package), a timm model (`"resnet50"`, `"resnet50.a1_in1k"`,
            `"hf-hub:org/name"`, `"local-dir:..."`), a local directory or a Hub repository of either library.
        num_classes (`int`, *optional*): Number of classes; a head of another size is created afresh. `None`: as saved.
        pretrained (`bool`): Load the weights, not only the architecture.
        revision (`str`, *optional*), token (*optional*): Passed on to the Hub.

    Raises:
        ValueError: If nothing by that name is known; the message suggests the nearest timm names.
    """
    changes = {} if num_classes is None else {"num_classes": num_classes}
    if name in SHIPPED:
        return timm.create_model(f"local-dir:{SHIPPED[name]}", pretrained=pretrained, **changes)
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return timm.create_model(name, pretrained=pretrained, **changes)
    if timm.is_model(name):
        try:
            return timm.create_model(name, pretrained=pretrained, **changes)
        except Exception as error:
            raise OSError(
                f"The pretrained weights of timm's {name!r} could not be loaded ({error}). Without a network, pass a "
                "model created from local weights, or a local directory."
            ) from error
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
    if "architecture" in saved:
        prefix = "local-dir" if os.path.isdir(source) else "hf-hub"
        suffix = f"@{revision}" if revision and prefix == "hf-hub" else ""
        return timm.create_model(f"{prefix}:{source}{suffix}", pretrained=pretrained, **changes)
    labels = {} if num_classes is None else {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    options = {"revision": revision or "main", "token": token}
    if not pretrained:
        labels.pop("ignore_mismatched_sizes", None)
        return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(source, **labels, **options))
    # Only safetensors: a pickle from the Hub could run code.
    return AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, **labels, **options)


def library_of(model: nn.Module) -> str:
    """`"timm"` or `"transformers"`; raises `TypeError` for anything else."""
    if isinstance(model, PreTrainedModel):
        if type(model).__name__.startswith("TimmWrapper"):
            raise TypeError(
                "TimmWrapper models are not supported: pass the timm model itself, e.g. "
                "`timm.create_model('hf-hub:...', pretrained=True)`. An adapter of it loads on the wrapper with "
                "`key_mapping={'^': 'timm_model.'}`."
            )
        return "transformers"
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    raise TypeError(
        f"Expected a timm model, a transformers image classifier or a checkpoint name, got {type(model).__name__}."
    )


def resolve_preprocessing(model: nn.Module, name: str | None = None) -> Preprocessing:
    """What the checkpoint expects of an image: timm's `pretrained_cfg`, or the image processor of transformers.

    A transformers model that was built in memory has no saved processor; its class's default one is taken then, with a
    warning, since checkpoints of one class may differ in mean and standard deviation.
    """
    if library_of(model) == "timm":
        return Preprocessing.from_timm(model)
    source = name or getattr(model, "name_or_path", None)
    if source:
        try:
            processor = AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:  # no processor was saved with the checkpoint
            logger.warning("The image processor of %s could not be loaded (%s).", source, error)
        else:
            return Preprocessing.from_image_processor(processor)
    processors = IMAGE_PROCESSOR_MAPPING.get(type(model.config), None)
    if not processors:
        raise ValueError(
            f"No image processor is known for {type(model).__name__}: pass `preprocessing=Preprocessing(...)`."
        )
    default = Preprocessing.from_image_processor(next(iter(processors.values()))())
    size = getattr(model.config, "image_size", None)
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        default = Preprocessing(**{**default.to_dict(), "image_size": size})
    logger.warning(
        "%s has no saved image processor; assuming its class's default (mean %s, std %s, %s pixels). Pass "
        "`preprocessing=Preprocessing(...)` if the checkpoint was trained otherwise.",
        type(model).__name__,
        default.mean,
        default.std,
        " x ".join(map(str, default.image_size)),
    )
    return default


def num_classes_of(model: nn.Module) -> int:
    """K, the number of logits."""
    return model.num_classes if library_of(model) == "timm" else model.config.num_labels


def label_names_of(model: nn.Module) -> list[str] | None:
    """Class names that the checkpoint carries, in class order, or `None` if it has only placeholders."""
    if library_of(model) == "timm":
        names = model.pretrained_cfg.get("label_names")
        return list(names) if names and len(names) == model.num_classes else None
    labels = model.config.id2label
    names = [labels[index] for index in range(len(labels))]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def describe_backbone(model: nn.Module, name: str | None, revision: str | None = None) -> dict[str, Any]:
    """A JSON record of where the backbone came from and how to build its architecture again.

    `config` is `None` when the architecture cannot be rebuilt from its name and arguments (layers were replaced by
    hand): loading then needs the model itself.
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
            config = AutoConfig.for_model(**record["config"])
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
        return json.loads(path.read_text())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
