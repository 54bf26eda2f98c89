"""Saving and loading: the files of a model, written whole or not at all, and checked before anything is loaded.

Which files there are is told in [`layout`].
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backbones, branches
from .attacks.pgd import forget_cached
from .config import AUTOLORA_FIELDS
from .consistency import check_files
from .digests import weights_digest
from .download import commit_of, download, is_repository_name
from .files import (
    FLOATS,
    check_finite,
    check_nothing_wrong,
    inside,
    load_tensors,
    read_header,
    save_tensors,
    staged,
    write_json,
)
from .fingerprint import fingerprint
from .layers import LORA_FIELDS
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    NATURAL_ADAPTER,
    NATURAL_CONFIG,
    NATURAL_FACTORS,
    PROCESSOR_CONFIG,
    ROBUST_FACTORS,
    base_tensors,
    deployed_tensors,
    natural_adapter,
    natural_factors,
    natural_tensors,
    robust_adapter,
    robust_factors,
    weight_files,
)
from .record import RECORD, Record
from .routes import ROBUST
from .untrusted import bounded_size


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


logger = logging.getLogger(__name__)

PACKAGES = ("autolora-hf", "torch", "timm", "transformers", "peft")
# Every file that a save can write, by the mode in which it does.
FILES = {
    "full": (BASE_WEIGHTS, BASE_CONFIG, PROCESSOR_CONFIG, NATURAL_ADAPTER, NATURAL_CONFIG, NATURAL_FACTORS),
    "adapter": (
        ADAPTER_WEIGHTS,
        ADAPTER_CONFIG,
        ROBUST_FACTORS,
        NATURAL_ADAPTER,
        NATURAL_CONFIG,
        NATURAL_FACTORS,
    ),
}


# ---- saving ----


def save(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """See [`AutoLoraModel.save_pretrained`]."""
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"`save_directory` must be a folder, but {directory} is a file.")
    earlier = _files_of_an_earlier_save(directory)
    robust_file, natural_file = weight_files(model)
    if ROBUST_FACTORS == robust_file:
        logger.warning(
            "Stock PEFT has no exact layer for every branch of this adapter, so it is saved as %s, which "
            "`load_autolora_model` reads.%s",
            ROBUST_FACTORS,
            " `merge_and_unload()` gives a plain model." if branches.mergeable(model.lora_layers(), [ROBUST]) else "",
        )
    # A route may have its own norms in the place of the others: those of the deployed one are saved as the model's.
    with model.route(ROBUST), staged(directory, last=RECORD) as folder:
        if natural_file == NATURAL_ADAPTER:
            _save_adapter(model, *natural_adapter(model), (folder / natural_file).parent)
        elif natural_file is not None:
            save_tensors(natural_tensors(model), folder / natural_file)
        if robust_file == BASE_WEIGHTS:
            _save_base(model, base_tensors(model), folder)
        elif robust_file == ADAPTER_WEIGHTS:
            _save_adapter(model, *robust_adapter(model), folder)
        else:
            save_tensors(deployed_tensors(model), folder / robust_file)
        make_record(model).write(folder / RECORD)
        written = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    for name in earlier:
        # A loader would take them for the model.
        if name not in written:
            (directory / name).unlink(missing_ok=True)
    natural_folder = (directory / NATURAL_ADAPTER).parent
    if NATURAL_ADAPTER in earlier and NATURAL_ADAPTER not in written and natural_folder.is_dir():
        natural_folder.rmdir()


def save_plain(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """Writes the deployed robust model as an ordinary timm or transformers checkpoint, with every branch merged.

    `timm.create_model("local-dir:...", pretrained=True)` or `AutoModelForImageClassification.from_pretrained` load it,
    without PEFT and without this package. The model itself stays as it is.

    Raises:
        ValueError: If the architecture was changed by hand, so that its library could not build it again; or if the
            robust branch is of a kind that cannot be merged.
    """
    if model.backbone["config"] is None:
        raise ValueError(
            f"This {model.backbone['architecture']} was changed by hand, so no configuration of its library "
            "describes it. Save the state dict of `merge_and_unload()` instead."
        )
    network = copy.deepcopy(model).merge_and_unload()
    with staged(Path(directory), last=BASE_WEIGHTS) as folder:
        _save_base(model, network.state_dict(), folder)


def _files_of_an_earlier_save(directory: Path) -> list[str]:
    """Files that an earlier save, perhaps in the other mode, left in this folder; never files that others wrote."""
    try:
        return list(FILES[Record.read(directory).mode])
    except (OSError, ValueError):
        return []


def _save_base(model: AutoLoraModel, tensors: dict[str, Tensor], folder: Path) -> None:
    record = model.backbone
    if record["library"] == "transformers" and record["config"] is not None:
        # transformers renames some keys on disk; its own writer knows how.
        state = {key: tensor.clone() for key, tensor in tensors.items()}
        network = model.get_base_model()
        known = network.config.id2label, network.config.label2id
        try:
            if model.label_names:
                network.config.id2label = dict(enumerate(model.label_names))
                network.config.label2id = {name: index for index, name in enumerate(model.label_names)}
            network.save_pretrained(folder, state_dict=state)
        finally:
            network.config.id2label, network.config.label2id = known
        processor = model.preprocessing.to_image_processor()
        if processor is not None:
            write_json(processor, folder / PROCESSOR_CONFIG)
        return
    if record["config"] is not None:
        config = dict(record["config"], num_classes=model.num_classes)
        config["pretrained_cfg"] = {**config["pretrained_cfg"], **model.preprocessing.to_timm()}
        if model.label_names:
            # The checkpoint may bring the names of another task, in both places.
            config["label_names"] = config["pretrained_cfg"]["label_names"] = model.label_names
        write_json(config, folder / BASE_CONFIG)
    save_tensors(tensors, folder / BASE_WEIGHTS)


def _save_adapter(model: AutoLoraModel, tensors: dict[str, Tensor], config: Any, folder: Path) -> None:
    base = model.get_base_model()
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)


def make_record(model: AutoLoraModel) -> Record:
    """What [`save`] writes into `autolora_config.json`. Results that were measured with other weights are left out."""
    config, layers = model.autolora_config, model.lora_layers()
    values = {name: getattr(config, name) for name in (*AUTOLORA_FIELDS, *LORA_FIELDS)}
    values["target_modules"] = sorted(layers)
    values["modules_to_save"] = list(config.modules_to_save or []) or None
    # Every branch of a layer has the same rank.
    adapter, known = next(iter(model.peft_config)), config.kind.fields
    for pattern, attribute in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        usual = getattr(config, attribute)
        values[pattern] = {
            name: getattr(layer, attribute)[adapter]
            for name, layer in layers.items()
            if pattern in known and getattr(layer, attribute)[adapter] != usual
        }
    return Record(
        config=values,
        backbone=model.backbone,
        num_classes=model.num_classes,
        label_names=model.label_names,
        preprocessing=model.preprocessing,
        threat_model=model.threat_model,
        training=model.training_plan,
        results=current_results(model),
        fingerprint=fingerprint(model),
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
    )


def current_results(model: AutoLoraModel) -> list[dict[str, Any]]:
    """The results of a model that were measured with the weights it has now."""
    if not model.results:
        return []
    digest = deployed_digest(model)
    results = [result for result in model.results if result.get("weights_sha256") == digest]
    if len(results) < len(model.results):
        logger.warning(
            "%d of %d measured results belong to other weights than the model has now, and are left out.",
            len(model.results) - len(results),
            len(model.results),
        )
    return results


def without_times(result: dict[str, Any]) -> str:
    """A result as JSON text, without the seconds that it and its attacks took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != "seconds"}
        return [timeless(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(timeless(result), sort_keys=True)


def deployed_digest(model: AutoLoraModel) -> str:
    """SHA-256 of the weights of the deployed route that training changes."""
    with model.route(ROBUST):
        return weights_digest(deployed_tensors(model))


# ---- loading ----


def fetch(name_or_path: str | os.PathLike, **options: Any) -> tuple[Path, Record]:
    """Folder and record of a saved model, from disk or from the Hub; `options` are those of [`download`].

    The record comes first: what is not a model of this package is refused before its weights are fetched.

    Raises:
        FileNotFoundError, PermissionError, OSError: See [`download`].
        ValueError: If record and headers of the files are damaged, hostile or do not belong together.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        name = str(name_or_path)
        if not is_repository_name(name):
            raise FileNotFoundError(f"{name} is neither a folder nor a Hub repository name 'org/name'.")
        path = download(name, [RECORD, ADAPTER_CONFIG, BASE_CONFIG], **options)
        record = Record.read(path, name)
        pinned = {**options, "revision": commit_of(path) or options.get("revision")}
        path = download(name, [RECORD, *FILES[record.mode]], **pinned)
    record = Record.read(path)
    check_files(path, record)
    return path, record


def rebuild(directory: Path, record: Record) -> nn.Module:
    """Mode `full`: a network of the recorded architecture, as large as the saved weights and yet without them."""
    with bounded_size(read_header(inside(directory, BASE_WEIGHTS))):
        # First without memory.
        backbones.rebuild_backbone(record.backbone)
        return backbones.rebuild_backbone(record.backbone, device="cpu")


def load_weights(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """See [`AutoLoraModel.load_weights`]."""
    with model.route(ROBUST):
        _load_weights(model, Path(directory))
    forget_cached(model)


def _load_weights(model: AutoLoraModel, directory: Path) -> None:
    robust_file, natural_file = weight_files(model)
    robust_path, natural_path = inside(directory, robust_file), inside(directory, natural_file or NATURAL_FACTORS)
    if robust_file == BASE_WEIGHTS:
        robust = _load_base(model, robust_path)
    elif robust_file == ADAPTER_WEIGHTS:
        raw = load_tensors(robust_path, robust_adapter(model)[0])
        robust = robust_factors(model, raw)
    else:
        robust = load_tensors(robust_path, deployed_tensors(model))
    if natural_file == NATURAL_ADAPTER:
        natural = natural_factors(model, load_tensors(natural_path, natural_adapter(model)[0]), robust)
    else:
        natural = {} if natural_file is None else load_tensors(natural_path, natural_tensors(model))
    with torch.no_grad():
        for live, loaded in ((deployed_tensors(model), robust), (natural_tensors(model), natural)):
            for name, tensor in live.items():
                tensor.copy_(loaded[name])


def _load_base(model: AutoLoraModel, path: Path) -> dict[str, Tensor]:
    live, header = base_tensors(model), read_header(path)
    record = model.backbone
    if record["library"] != "transformers" or record["config"] is None or header.keys() == live.keys():
        return load_tensors(path, live)
    # transformers keeps the key names of older releases on disk for some models; its own reader maps them. It fills in
    # what is missing, so tensors are handed on as they were found, to be checked.
    if sum(math.prod(info.shape) for info in header.values()) > 2 * sum(t.numel() for t in live.values()) + 1e6:
        raise ValueError(f"{path} does not belong to this model: it is more than twice as large. Nothing was loaded.")
    # Names do not tell which tensors are integers, but there are as many of them.
    whole = [name for name, info in header.items() if info.dtype not in FLOATS]
    if len(whole) != sum(not tensor.is_floating_point() for tensor in live.values()):
        check_nothing_wrong({"of another kind": whole}, path)
    network, found = type(model.get_base_model()).from_pretrained(
        None,
        config=model.get_base_model().config,
        state_dict=load_tensors(path, None),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in found["mismatched_keys"]),
    }
    check_nothing_wrong(problems, path)
    check_finite(network.state_dict(), path, live)
    return network.state_dict()
