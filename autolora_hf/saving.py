"""Saving and loading: the files of a model, written whole or not at all, and checked before anything is loaded.

Which files there are is told in [`layout`].
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backbones
from .attacks.pgd import attack_mode, forget_cached
from .config import AUTOLORA_FIELDS
from .download import commit_of, download, is_repository_name
from .files import (
    FLOATS,
    TensorInfo,
    check_finite,
    check_nothing_wrong,
    inside,
    load_tensors,
    read_header,
    save_tensors,
    staged,
    write_json,
)
from .layers import weight_name
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_WEIGHTS,
    LORA_FIELDS,
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
from .pixels import Preprocessing
from .record import RECORD, Record
from .routes import NATURAL, ROBUST


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
            "Stock PEFT has no exact LoRA layer for every branch of this adapter, so it is saved as %s, which "
            "`load_autolora_model` reads. `merge_and_unload()` gives a plain model.",
            ROBUST_FACTORS,
        )
    # A route may have its own norms in the place of the others: those of the deployed one are saved as the model's.
    with model.route(ROBUST), staged(directory, last=RECORD) as folder:
        if natural_file == NATURAL_ADAPTER:
            _save_adapter(model, *natural_adapter(model), (folder / natural_file).parent)
        else:
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
    if natural_file not in written and (directory / NATURAL_ADAPTER).parent.is_dir():
        (directory / NATURAL_ADAPTER).parent.rmdir()


def save_plain(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """Writes the deployed robust model as an ordinary timm or transformers checkpoint, with every branch merged.

    `timm.create_model("local-dir:...", pretrained=True)` or `AutoModelForImageClassification.from_pretrained` load it,
    without PEFT and without this package. The model itself stays as it is.

    Raises:
        ValueError: If the architecture was changed by hand, so that its library could not build it again.
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
            config["label_names"] = model.label_names
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
    values["rank_pattern"] = {name: layer.r[NATURAL] for name, layer in layers.items() if layer.r[NATURAL] != config.r}
    values["alpha_pattern"] = {
        name: layer.lora_alpha[NATURAL]
        for name, layer in layers.items()
        if layer.lora_alpha[NATURAL] != config.lora_alpha
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


def deployed_digest(model: AutoLoraModel) -> str:
    """SHA-256 of the weights of the deployed route that training changes."""
    with model.route(ROBUST):
        return backbones.weights_digest(deployed_tensors(model))


# ---- the fingerprint ----


def fingerprint(model: AutoLoraModel) -> dict[str, list[list[float]]] | None:
    """Logits of both routes for two fixed images; `None` if they are not finite.

    Names and shapes of weights do not tell everything about a model: with it a loader notices a network whose forward
    is another one, in a later release of its library for instance.
    """
    logits = {route: _fixed_logits(model, route) for route in (ROBUST, NATURAL)}
    if not all(values.isfinite().all() for values in logits.values()):
        return None
    return {route: [[float(f"{x:.7g}") for x in row] for row in values.tolist()] for route, values in logits.items()}


def check_fingerprint(model: AutoLoraModel, record: Record, source: str | os.PathLike) -> None:
    """Warns if the loaded model does not compute what it computed when it was saved."""
    for route, saved in (record.fingerprint or {}).items():
        expected, found = torch.tensor(saved, dtype=torch.float64), _fixed_logits(model, route)
        if expected.shape == found.shape:
            # Rounding is magnified a thousandfold in some networks; another forward is not that near.
            difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
            if difference < 0.05:
                continue
        logger.warning(
            "The %s route of %s does not compute what it computed when it was saved: its logits for two fixed images "
            "differ. Its figures may not hold. It was saved with %s.",
            route,
            source,
            ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        )


@torch.no_grad()
def _fixed_logits(model: AutoLoraModel, route: str) -> Tensor:
    with attack_mode(model):
        view = model.pixel_space(route)
        pixels = _fixed_images(model.preprocessing).to(next(model.parameters()).device)
        return view(pixels).double().cpu()


def _fixed_images(preprocessing: Preprocessing) -> Tensor:
    """Two smooth coloured patterns, 2 x 3 x H x W, of whole 255ths: the same on every machine."""
    height, width = preprocessing.image_size
    rows = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    columns = torch.linspace(0, 1, width, dtype=torch.float64)[None, :]
    waves = [torch.sin(math.tau * (n * rows + (5 - n) * columns) + n) for n in range(6)]
    pixels = torch.stack(waves).view(2, 3, height, width)
    return ((pixels + 1) * 127).round().float() / 255


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
        path = download(name, [RECORD, ADAPTER_CONFIG], **options)
        record = Record.read(path)
        pinned = {**options, "revision": commit_of(path) or options.get("revision")}
        path = download(name, [RECORD, *FILES[record.mode]], **pinned)
    record = Record.read(path)
    check_files(path, record)
    return path, record


def check_files(directory: Path, record: Record) -> None:
    """Compares the headers of a saved model's files with its record, before any memory is spent on either.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged or a link out of the folder, or if the record asks for larger branches or more
            classes than the files have.
    """
    robust = (BASE_WEIGHTS,) if record.mode == "full" else (ADAPTER_WEIGHTS, ROBUST_FACTORS)
    robust, natural = _first(directory, *robust), _first(directory, NATURAL_ADAPTER, NATURAL_FACTORS)
    headers = {path: read_header(path) for path in (robust, natural)}
    shapes = {info.shape for info in headers[robust].values()}
    if not any(shape and shape[0] == record.num_classes for shape in shapes):
        raise ValueError(f"{robust} has no weights of a classifier of {record.num_classes} classes.")
    size, asked = 0, 0.0
    for name in record.config["target_modules"]:
        factors = _factors_of(headers[natural], name, natural)
        # The rank of a file's factors is at least that of the record, but for grouped layers, which cannot have as
        # many: theirs is the width of the layer.
        widest = max((side for info in factors for side in info.shape), default=0)
        if record.rank(name) > max(widest, 1024):
            raise ValueError(
                f"{directory / RECORD} asks for rank {record.rank(name):,} of {name}, but its branch in {natural} has "
                f"at most {widest:,}: the ranks cannot be right."
            )
        for info in factors:
            elements, rank = math.prod(info.shape), min(filter(None, info.shape), default=1)
            size += elements
            asked += elements * record.rank(name) / rank
    if asked > 64 * size + 1e6:
        raise ValueError(
            f"{directory / RECORD} asks for branches of about {asked:,.0f} values, but {natural} holds {size:,}: the "
            "ranks cannot be right."
        )


def _first(directory: Path, *names: str) -> Path:
    """The file of these that a folder has; the first one if it has none."""
    paths = [inside(directory, name) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def rebuild(directory: Path, record: Record) -> nn.Module:
    """Mode `full`: a network of the recorded architecture, as large as the saved weights and yet without them."""
    path = inside(directory, BASE_WEIGHTS)
    with backbones.bounded_size(read_header(path)):
        check_branches(backbones.rebuild_backbone(record.backbone), record, directory)
        return backbones.rebuild_backbone(record.backbone, device="cpu")


def check_branches(network: nn.Module, record: Record, directory: Path) -> None:
    """Compares what a record says of the layers of its backbone with the backbone, before branches are made.

    Raises:
        ValueError: If it names layers that the backbone does not have, or if their branches would be far larger than
            those in the folder's files.
    """
    modules = dict(network.named_modules())
    named = [*record.config["target_modules"], *(record.config["modules_to_save"] or [])]
    strangers = [name for name in named if name not in modules]
    if strangers:
        raise ValueError(
            f"{directory / RECORD} names {len(strangers)} layers that {type(network).__name__} does not have, such as "
            f"{strangers[0]}."
        )
    asked = sum(_branch_values(modules[name], record.rank(name), record) for name in record.config["target_modules"])
    natural = _first(directory, NATURAL_ADAPTER, NATURAL_FACTORS)
    held = sum(math.prod(info.shape) for info in read_header(natural).values())
    if asked > 2 * held + 1_000_000:
        raise ValueError(
            f"{directory / RECORD} asks for branches of {asked:,} values, but {natural} holds {held:,}: the ranks "
            "cannot be right."
        )


def _branch_values(layer: nn.Module, rank: int, record: Record) -> int:
    """How many values the factors of a branch of `layer` will have, see [`WeightLora`]."""
    weight = getattr(layer, weight_name(layer), None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.numel():
        return 0  # told in words when the branch is made
    rows = weight.shape[0]
    if record.config["layout"] == "released" and weight.ndim > 2:
        rows, rank = rows * weight.shape[2], rank * min(weight.shape[2], math.prod(weight.shape[3:]))
    columns = max(weight.numel() // rows, 1)
    if getattr(layer, "groups", 1) > 1:
        rank = min(rank, rows, columns)
    return rank * (rows + columns)


def _factors_of(header: dict[str, TensorInfo], layer: str, file: Path) -> list[TensorInfo]:
    for pattern in ("base_model.model.{}.{}.weight", "{}.{}"):
        names = [pattern.format(layer, side) for side in ("lora_A", "lora_B")]
        if all(name in header for name in names):
            return [header[name] for name in names]
    raise ValueError(f"{file} does not belong to this model (missing: the branch of {layer}). Nothing was loaded.")


def load_weights(model: AutoLoraModel, directory: str | os.PathLike) -> None:
    """See [`AutoLoraModel.load_weights`]."""
    with model.route(ROBUST):
        _load_weights(model, Path(directory))
    forget_cached(model)


def _load_weights(model: AutoLoraModel, directory: Path) -> None:
    robust_file, natural_file = weight_files(model)
    robust_path, natural_path = inside(directory, robust_file), inside(directory, natural_file)
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
        natural = load_tensors(natural_path, natural_tensors(model))
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
    check_finite(network.state_dict(), path)
    return network.state_dict()
