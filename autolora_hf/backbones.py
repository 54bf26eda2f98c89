"""Backbones: from a checkpoint name to a model, and from a model to a record that rebuilds it."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from . import architectures  # noqa: F401  (timm knows them from here on)
from .download import commit_of, download, is_repository_name
from .files import check_finite
from .inputs import (
    library_of,
    native_size,
    num_classes_of,
    problem_at,
    written,
    wrong_size_message,
)
from .pixels import size_pair
from .pretrained import from_config, load_pretrained, read_config, shapes_of
from .towers import advice, tower_config, tower_of
from .untrusted import check_size, safe_config, safe_weights


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
    tower: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Creates the image classifier, or the image tower, that `name` stands for.

    Args:
        name (`str`): `"quickstart"` (shipped with the package), a timm model (`"resnet50"`, `"resnet50.a1_in1k"`,
            `"hf-hub:org/name"`, `"local-dir:..."`), a local directory or a Hub repository of either library.
        num_classes (`int`, *optional*): Number of classes; a head of another size is created afresh. `None`: as saved.
        pretrained (`bool`): Load the weights, not only the architecture.
        image_size (`int` or `tuple[int, int]`, *optional*): Size of the images it shall take. A network that is built
            for one size is built for this one, and timm resamples its position embeddings. `None`: as saved.
        library (`str`, *optional*): `"transformers"` loads a timm checkpoint into transformers' wrapper.
        tower (`bool`): Open a checkpoint of a whole image-text model, such as CLIP, as its image tower. Otherwise a
            classifier is made of it. What was saved as an image tower is one anyway.
        revision (`str`, *optional*), token, cache_dir, local_files_only (*optional*): See [`download`].

    Raises:
        ValueError: If nothing by that name is known, the message suggests the nearest timm names; or if the network
            cannot take images of that size; or if there is no image tower where one is asked for.
    """
    size = None if image_size is None else size_pair(image_size)
    if timm.is_model(name):
        if tower:
            raise ValueError(f"timm's {name!r} is no image tower. {advice()}")
        return _load_timm(name, num_classes, pretrained, size, cache_dir)
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = _folder_of(name, pretrained=pretrained, **where)
    if folder is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"Unknown checkpoint {name!r}: not a timm model, not a directory, not a Hub name 'org/name'."
            + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    saved = safe_config(folder, name)
    # What transformers' wrapper saved names its own class; timm may not be able to read it.
    of_timm = "architecture" in saved and saved.get("model_type") != "timm_wrapper" and library != "transformers"
    if of_timm and tower:
        raise ValueError(f"{name} is no image tower but a model of timm. {advice()}")
    load, source = (_load_timm, f"local-dir:{folder}")
    if not of_timm:
        load, source = partial(load_pretrained, tower=name if tower else None), str(folder)
    try:
        if pretrained:
            check_size(safe_weights(folder, name, of_timm), partial(_native, folder, of_timm, tower), name)
        model = load(source, num_classes, pretrained, size)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{name} could not be loaded ({type(error).__name__}: {str(error)[:2000]}).") from error
    if pretrained:
        weights = model.state_dict()
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            # What a new network has at infinity may be there in a saved one.
            check_finite(weights, folder, load(source, num_classes, False, size).state_dict())
    return model


def resolved_name(name: str, revision: str | None = None, token: str | bool | None = None) -> tuple[str, str | None]:
    """How a record names a checkpoint so that others find it: without prefix, with the commit it is of.

    Args:
        name (`str`), revision (`str`, *optional*), token (*optional*): What [`load_backbone`] was called with.
    """
    if name in SHIPPED or timm.is_model(name) or os.path.isdir(name) or name.startswith("local-dir:"):
        return name, revision
    folder = _folder_of(name, pretrained=False, revision=revision, token=token)
    name = re.sub("^hf[-_]hub:", "", name)
    return name.partition("@")[0], commit_of(folder) or revision


def _folder_of(name: str, *, pretrained: bool, revision: str | None, **options: Any) -> Path | None:
    """The folder with the files of a checkpoint; a Hub repository is downloaded. `None`: no such name."""
    if name in SHIPPED:
        return SHIPPED[name]
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    if os.path.isdir(name):
        return Path(name)
    on_hub = name.startswith(("hf-hub:", "hf_hub:"))
    repository, _, suffix = re.sub("^hf[-_]hub:", "", name).partition("@")
    if not on_hub and not is_repository_name(repository):
        return None
    # Never the pickles that a repository may hold as well.
    files = ["config.json", "preprocessor_config.json"]
    if pretrained:
        files += ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    return download(repository, files, revision=revision or suffix or None, **options)


def _load_timm(
    name: str,
    num_classes: int | None,
    pretrained: bool,
    size: tuple[int, int] | None,
    cache_dir: str | os.PathLike | None = None,
) -> nn.Module:
    changes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if cache_dir is not None:
        changes["cache_dir"] = cache_dir
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
                raise ValueError(f"{name} could not be loaded: {error}") from error
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


def label_names_of(model: nn.Module) -> list[str] | None:
    """Class names that the checkpoint carries, in class order, or `None` if it has only placeholders."""
    if tower_of(model) is not None:
        return None
    if library_of(model) == "timm":
        names = model.pretrained_cfg.get("label_names")
        return list(names) if isinstance(names, (list, tuple)) and len(names) == model.num_classes else None
    labels = model.config.id2label or {}  # PVT's configuration has none
    names = [labels.get(index) for index in range(len(labels))]
    if not all(isinstance(label, str) for label in names):
        return None
    return names if len(names) == num_classes_of(model) and names[0] != "LABEL_0" else None


def describe_backbone(
    model: nn.Module,
    name: str | None,
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """A JSON record of where the backbone came from and how to build its architecture again.

    `config` is `None` when the architecture cannot be rebuilt from its name and arguments (layers were replaced by
    hand): loading then needs the model itself. `image_size` is what [`load_backbone`] was called with, and `resampled`
    the tensors that were resampled for it.
    """
    library = library_of(model)
    record: dict[str, Any] = {"library": library, "name_or_path": None, "revision": None, "config": None}
    if name is not None:
        record["name_or_path"], record["revision"] = resolved_name(name, revision, token)
    if library == "timm":
        record["architecture"] = model.pretrained_cfg["architecture"]
        record["config"] = _timm_config(model)
    else:
        record["architecture"] = type(model).__name__
        record["name_or_path"] = record["name_or_path"] or model.name_or_path or None
        record["config"] = json.loads(model.config.to_json_string(use_diff=True))
    if name is not None and image_size is not None:
        record["image_size"] = list(size_pair(image_size))
        with torch.device("meta"):
            options = {"revision": revision, "library": library, "token": token}
            options["tower"] = tower_of(model) is not None
            original = load_backbone(name, num_classes_of(model), pretrained=False, **options)
        shapes = shapes_of(original)
        record["resampled"] = sorted(key for key, shape in shapes_of(model).items() if shapes.get(key) != shape)
    try:
        rebuilt = rebuild_backbone(record)
    except Exception:
        rebuilt = None
    # The printed structure covers what shapes do not: strides, paddings, epsilons, kinds of pooling.
    if rebuilt is None or repr(rebuilt) != repr(model) or shapes_of(rebuilt) != shapes_of(model):
        record["config"] = None
    return record


def rebuild_backbone(record: dict[str, Any], device: str = "meta") -> nn.Module:
    """The architecture of a record of [`describe_backbone`], without weights.

    Raises:
        ValueError: If the record has no configuration, or its library cannot build a network of it.
    """
    if record["config"] is None:
        raise ValueError(
            f"The {record['architecture']} of this adapter was changed by hand, so it cannot be built from its name: "
            "pass the model as `base_model=`."
        )
    try:
        with torch.device(device):
            return _build(record)
    except Exception as error:
        raise ValueError(
            f"The recorded {record['architecture']} cannot be built by this release of {record['library']} "
            f"({type(error).__name__}: {str(error)[:2000]})."
        ) from error


def _build(record: dict[str, Any]) -> nn.Module:
    if record["library"] == "transformers":
        # A copy, since some classes change what they read.
        saved = copy.deepcopy(record["config"])
        wrapped = saved.get("architecture") if saved["model_type"] == "timm_wrapper" else None
        if wrapped is not None and not timm.is_model(wrapped):
            raise ValueError(f"{wrapped!r} is no model of timm")
        config = CONFIG_MAPPING[saved["model_type"]].from_dict(saved)
        # Some configurations stand for several classes.
        config.architectures = [record["architecture"]]
        return from_config(config)
    config = record["config"]
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{config['architecture']!r} is no model of timm")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=config["num_classes"])


def _native(folder: Path, of_timm: bool, tower: bool) -> nn.Module:
    """The network of a checkpoint as it was saved, without its weights."""
    if of_timm:
        return timm.create_model(f"local-dir:{folder}")
    config = read_config(str(folder))
    return from_config(tower_config(config, str(folder)) if tower else config)


def _timm_config(model: nn.Module) -> dict[str, Any] | None:
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            save_config_for_hf(model, str(path))
        except Exception:  # an argument of the model is not JSON, or a note about its weights is of a wrong type
            return None
        config = json.loads(path.read_text())
    # timm writes the number of classes twice, and transformers' wrapper then fails to load the checkpoint.
    config.get("model_args", {}).pop("num_classes", None)
    return config
