"""Saving and loading: the files of a model, written whole or not at all, and checked before anything is loaded.

| file | mode `full` | mode `adapter` |
|---|---|---|
| `model.safetensors`, `config.json` | the robust model, an ordinary timm or transformers checkpoint | - |
| `adapter_model.safetensors`, `adapter_config.json` | - | the robust adapter: stock PEFT LoRA, head, BatchNorm |
| `robust.safetensors` | - | instead of these two, if a branch is on a layer that stock PEFT has no exact LoRA for |
| `natural.safetensors` | LoRA branch and own BatchNorm set of the natural route | the same |
| `autolora_config.json` | everything else | the same |

The natural branch has no `adapter_config.json` on purpose: loaded alone by PEFT it would be silently wrong, because it
was trained on top of the robust weights.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from . import backbones, targets
from .attacks.pgd import forget_cached
from .config import AUTOLORA_FIELDS, AutoLoraConfig
from .files import load_tensors, save_tensors, staged, write_json
from .layers import WeightLora, fold_factors, unfold_factors, weight_name
from .routes import NATURAL, ROBUST


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORD = "autolora_config.json"
NATURAL_WEIGHTS = "natural.safetensors"
BASE_WEIGHTS, BASE_CONFIG = "model.safetensors", "config.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROBUST_WEIGHTS = "robust.safetensors"
_PEFT_PREFIX = "base_model.model."
# `LoraConfig` fields that shape a branch; the rest is at PEFT's defaults, which `AutoLoraConfig` enforces.
_LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")


def factor(layer: LoraLayer, side: str, adapter: str) -> nn.Parameter:
    """The `lora_A` or `lora_B` parameter of one adapter, for PEFT's layers and ours."""
    value = getattr(layer, side)[adapter]
    return value if isinstance(value, nn.Parameter) else value.weight


# ---- what a model consists of: names on disk -> tensors of the live model ----


def base_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """The base model's state dict under its own names, as if no branch had been added."""
    base = model.get_base_model()
    renames = {f"{name}.base_layer.": f"{name}." for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    renames |= {
        f"{name}.original_module.": f"{name}."
        for name, m in base.named_modules()
        if isinstance(m, ModulesToSaveWrapper)
    }
    tensors = {}
    for key, tensor in base.state_dict().items():
        if re.search(r"\.lora_[AB]\.|\.modules_to_save\.", key):
            continue
        wrapper = next((prefix for prefix in renames if key.startswith(prefix)), None)
        tensors[key if wrapper is None else renames[wrapper] + key[len(wrapper) :]] = tensor
    return tensors


def natural_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """Factors of the natural branch and, with `norm="dual"`, the natural BatchNorm set."""
    tensors = {
        f"{name}.{side}": factor(layer, side, NATURAL).detach()
        for name, layer in model.lora_layers().items()
        for side in ("lora_A", "lora_B")
    }
    for name, norm in model.natural_norms.items():
        tensors |= {f"{name.replace('/', '.')}.{key}": tensor for key, tensor in norm.state_dict().items()}
    return tensors


def robust_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """Mode `adapter`: what the robust adapter consists of, under PEFT's names (released factors not unfolded)."""
    tensors = {
        f"{_PEFT_PREFIX}{name}.{side}.weight": factor(layer, side, ROBUST).detach()
        for name, layer in model.lora_layers().items()
        for side in ("lora_A", "lora_B")
    }
    for name, module in model._saved_modules().items():
        tensors |= {f"{_PEFT_PREFIX}{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


def _digest_of_frozen(tensors: dict[str, Tensor], heads: list[str], backbone: dict[str, Any]) -> str:
    """Identity of a backbone; without its head, which is made afresh for another number of classes."""
    prefixes = tuple(f"{head}." for head in heads)
    # What was resampled for another image size differs in the last bit between processors.
    resampled = backbone.get("resampled", ())
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefixes) and k not in resampled}
    return backbones.weights_digest(kept)


def loads_with_stock_peft(model: AutoLoraModel) -> bool:
    """Mode `adapter`: whether PEFT alone has the exact LoRA layer for every branch of the robust route."""
    base, saved = model.get_base_model(), model._saved_modules()
    stock = all(name in model.stock_layers for name in model.lora_layers())
    # PEFT matches `modules_to_save` by the plain end of the name.
    told_apart = _matched_by_suffix(base, list(saved), separator="") is not None
    # Only a square kernel of the released layout has a counterpart in PEFT's.
    square = all(
        len(set(getattr(layer.get_base_layer(), weight_name(layer.get_base_layer())).shape[2:])) <= 1
        for layer in model.lora_layers().values()
        if isinstance(layer, WeightLora)
    )
    return stock and square and told_apart


# ---- saving ----


def save(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """See [`AutoLoraModel.save_pretrained`]."""
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"`save_directory` must be a folder, but {directory} is a file.")
    earlier = _files_of_an_earlier_save(directory)
    # A route may have its own norms in the place of the others: those of the deployed one are saved as the model's.
    with model.route(ROBUST), staged(directory, last=RECORD) as folder:
        save_tensors(natural_tensors(model), folder / NATURAL_WEIGHTS)
        if model.autolora_config.mode == "full":
            _save_base(model, folder)
        elif loads_with_stock_peft(model):
            _save_adapter(model, folder)
        else:
            logger.warning(
                "Stock PEFT has no exact LoRA layer for every branch of this adapter, so it is saved as %s, which "
                "`load_autolora_model` reads. `merge_and_unload()` gives a plain model.",
                ROBUST_WEIGHTS,
            )
            save_tensors(robust_tensors(model), folder / ROBUST_WEIGHTS)
        write_json(_record(model), folder / RECORD)
        written = {file.name for file in folder.iterdir()}
    for file in earlier:
        # A loader would take them for the model.
        if file.name not in written:
            file.unlink(missing_ok=True)


def _files_of_an_earlier_save(directory: Path) -> list[Path]:
    """Weights that an earlier save, perhaps in the other mode, left in this folder; never files that others wrote."""
    try:
        mode = backbones.read_json(directory / RECORD)["config"]["mode"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = {"full": (BASE_WEIGHTS, BASE_CONFIG), "adapter": (ADAPTER_WEIGHTS, ADAPTER_CONFIG, ROBUST_WEIGHTS)}
    return [directory / name for name in names.get(mode, ())]


def _save_base(model: AutoLoraModel, folder: Path) -> None:
    record, tensors = model.backbone, base_tensors(model)
    if record["library"] == "transformers" and record["config"] is not None:
        # transformers renames some keys on disk; its own writer knows how.
        state = {key: tensor.clone() for key, tensor in tensors.items()}
        model.get_base_model().save_pretrained(folder, state_dict=state)
        return
    if record["config"] is not None:
        config = dict(record["config"], num_classes=model.num_classes)
        config["pretrained_cfg"] = {**config["pretrained_cfg"], **model.preprocessing.to_timm()}
        if model.label_names:
            config["label_names"] = model.label_names
        write_json(config, folder / BASE_CONFIG)
    save_tensors(tensors, folder / BASE_WEIGHTS)


def _save_adapter(model: AutoLoraModel, folder: Path) -> None:
    tensors, layers = robust_tensors(model), model.lora_layers()
    config: LoraConfig = model.peft_config[ROBUST]
    changes: dict[str, Any] = {}
    if model.autolora_config.layout == "released":
        # Stock PEFT knows its own factorisation only; the same change of the weight has rank r k^2 there.
        ranks, alphas = {}, {}
        for name, layer in layers.items():
            keys = [f"{_PEFT_PREFIX}{name}.{side}.weight" for side in ("lora_A", "lora_B")]
            tensors[keys[0]], tensors[keys[1]] = _unfolded(layer, tensors[keys[0]], tensors[keys[1]])
            pattern = f"^{re.escape(name)}"
            ranks[pattern] = tensors[keys[0]].shape[0]
            alphas[pattern] = layer.scaling[ROBUST] * ranks[pattern]
        changes = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False}
    base = model.get_base_model()
    saved = {key: getattr(config, key) for key in _LORA_FIELDS}
    stock = LoraConfig(
        **{**saved, **changes},
        target_modules=_matched_by_suffix(base, list(layers)) or targets.exactly(layers),
        modules_to_save=list(model._saved_modules()),
        inference_mode=True,
        base_model_name_or_path=model.backbone["name_or_path"],
    )
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    stock.save_pretrained(str(folder), auto_mapping_dict=mapping)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)


def _matched_by_suffix(base: nn.Module, names: list[str], separator: str = ".") -> list[str] | None:
    """`names`, if PEFT, which matches the ends of names, takes them for these layers and no others."""
    layers = {re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+)$", "", n) for n, _ in base.named_modules()}
    ends = tuple(f"{separator}{name}" for name in names)
    return names if {name for name in layers if f"{separator}{name}".endswith(ends)} == set(names) else None


def _unfolded(layer: WeightLora, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer.get_base_layer(), nn.Linear):
        return lora_a, lora_b
    return unfold_factors(lora_a, lora_b, layer.kernel_width)


def _record(model: AutoLoraModel) -> dict[str, Any]:
    config = model.autolora_config
    fields = {name: getattr(config, name) for name in (*AUTOLORA_FIELDS, *_LORA_FIELDS)}
    backbone = dict(model.backbone)
    if config.mode == "adapter":
        backbone["weights_sha256"] = _digest_of_frozen(base_tensors(model), config.heads, backbone)
    return {
        "schema_version": SCHEMA_VERSION,
        "config": {**fields, "target_modules": sorted(model.lora_layers())},
        "backbone": backbone,
        "num_classes": model.num_classes,
        "label_names": model.label_names,
        "preprocessing": model.preprocessing.to_dict(),
        "threat_model": model.threat_model.to_dict(),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("autolora-hf", "torch", "timm", "transformers", "peft")
        },
    }


# ---- loading ----


def resolve_directory(name_or_path: str | os.PathLike, *, revision: str | None, token: str | bool | None) -> Path:
    """The local folder, or a download of the Hub repository limited to JSON and safetensors files."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{name} is neither a folder nor a Hub repository name 'org/name'.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:
        raise OSError(
            f"{name} is not a folder here, and could not be downloaded from the Hub ({error}). Check the name, your "
            "network and, for a private or gated repository, your token."
        ) from error


def read_record(directory: Path) -> dict[str, Any]:
    """`autolora_config.json` of a saved model."""
    if not (directory / RECORD).is_file():
        kind = (
            " It holds a plain PEFT adapter: use `PeftModel.from_pretrained`."
            if (directory / ADAPTER_CONFIG).is_file()
            else ""
        )
        raise FileNotFoundError(f"{directory} has no {RECORD}, so it was not saved by autolora_hf.{kind}")
    record = backbones.read_json(directory / RECORD)
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{directory / RECORD} has schema version {version!r}; this release of autolora_hf reads version "
            f"{SCHEMA_VERSION}. Upgrade with `pip install --upgrade autolora-hf`."
        )
    return record


def check_backbone(backbone: nn.Module, record: dict[str, Any]) -> None:
    """Raises `ValueError` if the adapter of `record` belongs to another architecture or other classes or weights."""
    classes = backbones.num_classes_of(backbone)
    if classes != record["num_classes"]:
        raise ValueError(
            f"The saved model has {record['num_classes']} classes but the base model has {classes}. Create the base "
            f"model with {record['num_classes']} classes."
        )
    digest, heads = record["backbone"].get("weights_sha256"), AutoLoraConfig(**record["config"]).heads
    if digest and digest != _digest_of_frozen(backbone.state_dict(), heads, record["backbone"]):
        raise ValueError(
            "The adapter was trained on other weights than this base model has (their SHA-256 differ), so its robust "
            f"accuracy would not hold. It was trained on {record['backbone']['name_or_path'] or 'an unnamed model'} "
            f"({record['backbone']['architecture']})."
        )


def load_weights(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """See [`AutoLoraModel.load_weights`]."""
    with model.route(ROBUST):
        _load_weights(model, Path(directory))
    forget_cached(model)


def _load_weights(model: AutoLoraModel, directory: Path) -> None:
    parts = [(natural_tensors(model), load_tensors(directory / NATURAL_WEIGHTS), NATURAL_WEIGHTS)]
    if model.autolora_config.mode == "full":
        parts.append((base_tensors(model), _load_base(model, directory), BASE_WEIGHTS))
    elif loads_with_stock_peft(model):
        parts.append((robust_tensors(model), _load_adapter(model, directory), ADAPTER_WEIGHTS))
    else:
        parts.append((robust_tensors(model), load_tensors(directory / ROBUST_WEIGHTS), ROBUST_WEIGHTS))
    for live, loaded, file in parts:
        _check_same_names(live, loaded, directory / file)
    with torch.no_grad():
        for live, loaded, _ in parts:
            for name, tensor in live.items():
                tensor.copy_(loaded[name])


def _load_base(model: AutoLoraModel, directory: Path) -> dict[str, Tensor]:
    tensors = load_tensors(directory / BASE_WEIGHTS)
    record = model.backbone
    if (
        record["library"] == "transformers"
        and record["config"] is not None
        and tensors.keys() != base_tensors(model).keys()
    ):
        # transformers keeps the key names of older releases on disk for some models; its own reader maps them. It
        # fills in what is missing, so the tensors are handed on as they were found, to be checked.
        network, found = type(model.get_base_model()).from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tensors = {key: tensor for key, tensor in network.state_dict().items() if key not in found["missing_keys"]}
        tensors |= {key: torch.empty(0) for key in found["unexpected_keys"]}
        tensors |= {key: torch.empty(shape) for key, shape, _ in found["mismatched_keys"]}
    return tensors


def _load_adapter(model: AutoLoraModel, directory: Path) -> dict[str, Tensor]:
    tensors = load_tensors(directory / ADAPTER_WEIGHTS)
    if model.autolora_config.layout == "released":
        for name, layer in model.lora_layers().items():
            keys = [f"{_PEFT_PREFIX}{name}.{side}.weight" for side in ("lora_A", "lora_B")]
            if isinstance(layer.get_base_layer(), nn.Conv2d) and all(key in tensors for key in keys):
                tensors[keys[0]], tensors[keys[1]] = fold_factors(
                    tensors[keys[0]], tensors[keys[1]], layer.kernel_width
                )
    return tensors


def _check_same_names(live: dict[str, Tensor], loaded: dict[str, Tensor], file: Path) -> None:
    missing, extra = sorted(set(live) - set(loaded)), sorted(set(loaded) - set(live))
    other = sorted(name for name in set(live) & set(loaded) if live[name].shape != loaded[name].shape)
    problems = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", other))
        if names
    ]
    if problems:
        raise ValueError(
            f"{file} does not belong to this model ({'; '.join(problems)}). Nothing was loaded. It was saved from "
            "another architecture, number of classes or AutoLoraConfig."
        )
