"""Robust checkpoints of the field as timm models: strict about names, explicit about what a file does not say."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..backbones import describe_backbone
from ..checks import listed
from ..files import check_finite, save_tensors, staged, write_json
from ..pixels import Preprocessing
from .checkpoint_files import CheckpointFile, read_checkpoint
from .checkpoint_keys import KINDS, NORM_SETS, NORMALIZATIONS, Keys, Kind, recognise


REPORT = "conversion.json"
HEADS = ("auto", "keep", "new")
# Tried in this order for a file that is not said to be of another. The Bottleneck of timm has its stride in the 3x3
# convolution, as torchvision, MadryLab and kuangliu/pytorch-cifar have.
_LARGE_STEM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
_LARGE_STEM += ("resnext50_32x4d", "resnext101_32x8d")
_SMALL_STEM = ("resnet18_cifar", "resnet34_cifar", "resnet50_cifar")
_WIDE = ("wide_resnet28_10_cifar", "wide_resnet34_10_cifar", "wide_resnet34_20_cifar", "wide_resnet70_16_cifar")
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Args:
        model (`nn.Module`): A timm model in eval mode. Its `pretrained_cfg` has the input normalisation.
        report (`dict`): What was taken from where and what was dropped for which reason; content of `conversion.json`.
    """

    model: nn.Module
    report: dict[str, Any]


def convert_checkpoint(
    path: str | os.PathLike[str],
    architecture: str | None = None,
    kind: str | None = None,
    *,
    norm_set: str = "adversarial",
    num_classes: int | None = None,
    head: str = "auto",
    normalization: str | tuple[Sequence[float], Sequence[float]] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Conversion:
    """Makes a timm model of a checkpoint of robust training, without running anything that is in its file.

    Every tensor of the file is used or dropped for a reason that the report names, and every tensor of the network
    comes from the file, except those of a new head; anything else is an error that lists the names.

    Args:
        path (`str`): A file of safetensors or of `torch.save`.
        architecture (`str`, *optional*): Name of a timm model. `None`: the ResNet or WideResNet that has the weights.
        kind (`str`, *optional*): `"acl"` (ACL, DynACL, DynACL++, AIR, AIR++), `"advcl"` (AdvCL, A-InfoNCE), `"deacl"`,
            `"madry"` (robustness, robust-models-transfer) or `"robustbench"`. `None`: told from the names.
        norm_set (`str`): Of a network with two sets of norms, `"adversarial"` or `"natural"`.
        num_classes (`int`, *optional*): Classes of the model. Needed where a new head is made.
        head (`str`): `"keep"` takes the classifier of the file, `"new"` makes one that is zero. `"auto"`: kept if the
            file has one of real classes and of this size, as supervised checkpoints do, else new.
        normalization (*optional*): What the network was trained with where its file does not say: `"none"`,
            `"imagenet"`, `"cifar10"`, `"cifar100"`, `"half"` (mean and standard deviation 0.5), or mean and standard
            deviation.
        model_args (`Mapping`, *optional*): More arguments for the architecture, such as `depth`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or needs code to be loaded, if it is not clear what it is, or if its tensors
            are not those of the network.
    """
    _check_choice("kind", kind, (None, *KINDS))
    _check_choice("norm_set", norm_set, NORM_SETS)
    _check_choice("head", head, HEADS)
    if num_classes is not None and (isinstance(num_classes, bool) or num_classes < 1):
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    if architecture is not None and not timm.is_model(architecture):
        raise ValueError(f"`architecture` must be the name of a timm model, got {architecture!r}.")
    if model_args and architecture is None:
        raise ValueError("`model_args` needs `architecture`.")
    path = Path(path)
    file = read_checkpoint(path)
    keys = Keys(file.tensors)
    keys.remove_prefix("module.")
    dual = keys.has(r"\.bn_list\.\d")
    name = kind or recognise(keys)
    kind_of_file = KINDS[name]
    kind_of_file.translate(keys, norm_set)
    mean, std, source = _normalization(keys, kind_of_file, normalization)

    options = {"num_classes": num_classes or 1, **(model_args or {})}
    if architecture is None:
        architecture = _architecture(keys, options)
    if architecture in (*_SMALL_STEM, *_WIDE):
        options = {**keys.model_args, **options}
    classifier = get_pretrained_cfg(architecture).classifier or "fc"
    if not isinstance(classifier, str):
        raise ValueError(f"{architecture} has several heads ({listed(list(classifier))}), which is not supported.")
    kept = _settle_head(keys, kind_of_file, classifier, head, num_classes)
    options["num_classes"] = kept or num_classes
    model = _build(architecture, options, _pretrained_cfg(architecture, mean, std, kind_of_file, options))
    state, notes = _filled(model, keys, classifier, kept is None, path, architecture)
    model.load_state_dict(state)
    model.eval()
    report = {
        "source": _source(file, path),
        "kind": name,
        "architecture": architecture,
        "model_args": {key: value for key, value in options.items() if key != "num_classes"},
        "norm_set": norm_set if dual else None,
        "normalization": {"mean": list(mean), "std": list(std), "from": source},
        "image_size": list(model.pretrained_cfg["input_size"][1:]),
        "num_classes": options["num_classes"],
        "head": "new, all zero" if kept is None else "from the file",
        "tensors_used": len(keys.tensors),
        "dropped": [{"reason": reason, "names": sorted(names)} for reason, names in keys.dropped.items()],
        "notes": notes,
        "versions": {package: importlib.metadata.version(package) for package in ("autolora-hf", "torch", "timm")},
    }
    return Conversion(model, report)


def save_conversion(conversion: Conversion, directory: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint folder of timm, and `conversion.json`; it appears whole or cannot be loaded.

    Raises:
        ValueError: If the folder holds something else than an earlier conversion.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"{directory} is a file; name a folder to write to.")
    others = directory.is_dir() and any(not entry.name.startswith(".saving-") for entry in directory.iterdir())
    if others and not (directory / REPORT).is_file():
        raise ValueError(f"{directory} is not empty and holds no earlier conversion: name another folder.")
    config = describe_backbone(conversion.model, None)["config"]
    if config is None:
        raise ValueError(f"timm cannot build this {conversion.report['architecture']} again from its arguments.")
    with staged(directory, last="config.json") as folder:
        save_tensors(conversion.model.state_dict(), folder / "model.safetensors")
        write_json(conversion.report, folder / REPORT)
        write_json(config, folder / "config.json")
    return directory


def _check_choice(name: str, value: Any, options: Sequence[Any]) -> None:
    if value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}.")


def _source(file: CheckpointFile, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "sha256": file.sha256,
        "bytes": file.bytes,
        "entry": file.root,
        "other_entries": file.ignored[:50],
    }


# ---- input ----


def _normalization(
    keys: Keys, kind: Kind, given: str | tuple[Sequence[float], Sequence[float]] | None
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean, standard deviation, and where they come from."""
    if isinstance(given, str):
        _check_choice("normalization", given, tuple(NORMALIZATIONS))
        given = NORMALIZATIONS[given]
    if given is not None:
        mean, std = (tuple(float(value) for value in part) for part in given)
        Preprocessing(mean=mean, std=std)  # raises if they are none
        if keys.normalization not in (None, (mean, std)):
            raise ValueError(
                f"The file says that the network normalises with {keys.normalization}, not with {(mean, std)}: leave "
                "out `normalization` (--normalization)."
            )
        return mean, std, "file" if keys.normalization else "argument"
    if keys.normalization is not None:
        return *keys.normalization, "file"
    if kind.normalization is not None:
        return *NORMALIZATIONS[kind.normalization], f"{kind.title}: its code"
    raise ValueError(
        "The file does not say how the network normalises its input, and a wrong guess would cost accuracy without a "
        f"word. Pass normalization= (--normalization): {', '.join(map(repr, NORMALIZATIONS))}. In RobustBench, the "
        "ResNets of ImageNet that are made with `normalize_model` take 'imagenet', DMWideResNet 'cifar10' or "
        "'cifar100', and the class of a CIFAR network has `mu` and `sigma` or takes 'none'."
    )


def _pretrained_cfg(
    architecture: str, mean: Sequence[float], std: Sequence[float], kind: Kind, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What timm notes of a checkpoint; nothing of the weights that it would itself have for the architecture."""
    usual = get_pretrained_cfg(architecture)
    small = architecture in (*_SMALL_STEM, *_WIDE)
    size = usual.input_size if small or architecture not in _LARGE_STEM else (3, kind.image_size, kind.image_size)
    return {
        "architecture": architecture,
        "num_classes": options["num_classes"],
        "input_size": size,
        "fixed_input_size": usual.fixed_input_size,
        "pool_size": usual.pool_size if size == usual.input_size else None,
        # CIFAR and STL-10 as they are; of ImageNet the centre of 224 in 256, bilinear, as the field evaluates.
        "crop_pct": 1.0 if max(size[1:]) <= 96 else 0.875,
        "interpolation": "bilinear",
        "crop_mode": "center",
        "mean": tuple(mean),
        "std": tuple(std),
        "first_conv": usual.first_conv,
        "classifier": usual.classifier,
    }


# ---- architecture ----


def _architecture(keys: Keys, options: Mapping[str, Any]) -> str:
    """The network that has these tensors, or else the one that has the most of them."""
    stem = keys.tensors.get("conv1.weight")
    if stem is None or stem.ndim != 4:
        raise ValueError(
            f"No ResNet or WideResNet has these weights ({listed(sorted(keys.original.values()), 5)}). Pass "
            "architecture= (--architecture) with the name of the timm model they are of."
        )
    names = _WIDE if "norm.weight" in keys.tensors else _LARGE_STEM if stem.shape[-1] == 7 else _SMALL_STEM
    shares = {}
    for name in names:
        with torch.device("meta"):
            expected = timm.create_model(name, **options).state_dict()
        same = [key for key, tensor in expected.items() if _shape(keys, key) == tensor.shape]
        shares[name] = len(same) / len(expected.keys() | keys.tensors.keys())
    return max(shares, key=shares.__getitem__)


def _shape(keys: Keys, name: str) -> torch.Size | None:
    return keys.tensors[name].shape if name in keys.tensors else None


def _build(architecture: str, options: Mapping[str, Any], cfg: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **options)
    except TypeError as error:
        raise ValueError(f"{architecture} cannot be made with {dict(options)}: {error}.") from error


# ---- weights ----


def _settle_head(keys: Keys, kind: Kind, classifier: str, head: str, num_classes: int | None) -> int | None:
    """Number of classes of the file's classifier if it is kept; otherwise it is dropped and the result is `None`."""
    weight = keys.tensors.get(f"{classifier}.weight")
    classes = None if weight is None else weight.shape[0]
    fits = classes is not None and num_classes in (None, classes)
    if head == "keep" and not fits:
        what = "none" if classes is None else f"one of {classes} classes"
        raise ValueError(
            f"head='keep', but the file has {what}" + ("." if classes is None else f", not {num_classes}.")
        )
    if head == "keep" or (head == "auto" and kind.labels and fits):
        return classes
    if num_classes is None:
        raise ValueError(
            "Pass num_classes= (--num-classes), the number of classes of your data: the file has "
            + ("no classifier" if classes is None else "a classifier that is not kept")
            + ", so the model gets a new head."
        )
    reason = "classifier of another task" if kind.labels else "classifier of pseudo-labels or of a fine-tuning"
    keys.drop(re.escape(classifier) + r"\.", f"{reason}; the new head is zero")
    return None


def _filled(
    model: nn.Module, keys: Keys, classifier: str, new_head: bool, path: Path, architecture: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of `model` with the tensors of the file; raises `ValueError` unless they are exactly its own."""
    expected, notes = model.state_dict(), []
    ours = {name for name in expected if new_head and name.startswith(f"{classifier}.")}
    counters = {name for name in expected if name.endswith(_COUNTER)}
    if counters and not counters & keys.tensors.keys():
        # torch 0.4 and before did not have them, and nothing here uses them.
        ours |= counters
        notes.append("the file has no counters num_batches_tracked; they are 0")
    both = sorted((expected.keys() - ours) & keys.tensors.keys())
    floats = {name: expected[name].is_floating_point() for name in both}
    problems = {
        "missing": sorted(expected.keys() - ours - keys.tensors.keys()),
        "unknown": sorted(keys.original[name] for name in keys.tensors.keys() - (expected.keys() - ours)),
        "of another shape": [
            f"{keys.original[name]} {tuple(keys.tensors[name].shape)} for {tuple(expected[name].shape)}"
            for name in both
            if keys.tensors[name].shape != expected[name].shape
        ],
        "of another kind": [
            f"{keys.original[name]} ({keys.tensors[name].dtype})"
            for name in both
            if keys.tensors[name].is_floating_point() != floats[name]
        ],
    }
    found = [f"{what}: {listed(names, 10)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{path.name} is no {architecture} ({'; '.join(found)}). Nothing was converted. If it is another network, "
            "pass architecture= (--architecture) or kind= (--kind)."
        )
    state = {name: torch.zeros_like(expected[name]) for name in ours}
    state |= {name: keys.tensors[name].to(expected[name].dtype) for name in both}
    check_finite(state, path)
    negative = [name for name in both if name.endswith("running_var") and (state[name] < 0).any()]
    if negative:
        raise ValueError(f"{path.name} has negative variances ({listed(negative, 5)}). Nothing was converted.")
    return state, notes
