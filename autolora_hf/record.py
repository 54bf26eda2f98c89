"""`autolora_config.json`: what a saved model is, how to build it again, and what was measured of it.

The file may come from a stranger. Everything in it is checked for type, range and size before it is used; nothing in
it is code, a pattern to be matched or a file name to be opened.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .checks import (
    boolean,
    either,
    integer,
    json_object,
    layer_name,
    line,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    plain_json,
    revision,
    shown,
    text,
    wrong,
)
from .config import AutoLoraConfig, ThreatModel
from .files import inside, read_json, write_json
from .layers import BRANCHES
from .pixels import MOST_PIXELS, Preprocessing
from .untrusted import check_network


SCHEMA_VERSION = 2
RECORD = "autolora_config.json"
# More than any published vision model has, and few enough to be harmless.
_MOST_LAYERS, _MOST_CLASSES, _MOST_RANK = 5_000, 200_000, 65_536
# The names of the layers with a branch become one regular expression, which takes a second to compile for so many
# characters.
_MOST_CHARACTERS = 250_000
_LARGEST_FILE = 16 << 20


@dataclass
class Record:
    """Contents of `autolora_config.json`.

    Args:
        config (`dict`): Fields of [`AutoLoraConfig`] with every choice resolved: `target_modules`, `modules_to_save`
            and the keys of the two patterns are whole names of layers.
        backbone (`dict`): Where the backbone came from and how to build it, see [`describe_backbone`]; with the
            SHA-256 of its weights before training, without the head.
        num_classes (`int`): Number of classes.
        label_names (`list[str]`, *optional*): Class names in class order.
        preprocessing (`Preprocessing`): What the model expects of an image.
        threat_model (`ThreatModel`): What it was trained to withstand.
        training (`dict`, *optional*): The plan of the training: objective, epochs, optimiser and so on.
        results (`list[dict]`): Measurements of the deployed route, as [`RobustnessReport.to_dict`] gives them, each
            with the `weights_sha256` it belongs to.
        fingerprint (`dict[str, list[list[float]]]`, *optional*): Logits of both routes for two fixed images.
        versions (`dict[str, str]`): Versions of the packages that wrote it.
    """

    config: dict[str, Any]
    backbone: dict[str, Any]
    num_classes: int
    label_names: list[str] | None
    preprocessing: Preprocessing
    threat_model: ThreatModel
    training: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: dict[str, list[list[float]]] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return self.config["mode"]

    @property
    def natural_route(self) -> str:
        return self.config.get("natural_route", "branch")

    @property
    def branch(self) -> str:
        return self.config.get("branch", "lora")

    def rank(self, layer: str) -> int:
        """Rank of the branches of one layer."""
        return self.config["rank_pattern"].get(layer, self.config["r"])

    def autolora_config(self) -> AutoLoraConfig:
        """The configuration, with names turned into patterns that match them and nothing else."""
        patterns = {
            name: {f"^{re.escape(layer)}": value for layer, value in self.config[name].items()}
            for name in ("rank_pattern", "alpha_pattern")
        }
        names = "|".join(map(re.escape, self.config["target_modules"])) or None
        return AutoLoraConfig(**{**self.config, **patterns, "target_modules": names})

    def to_dict(self) -> dict[str, Any]:
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("preprocessing", "threat_model"):
            content[name] = content[name].to_dict()
        return {"schema_version": SCHEMA_VERSION, **content}

    def write(self, path: Path) -> None:
        """Writes it as JSON. Raises `ValueError`, and writes nothing, if it could not be read back."""
        content = self.to_dict()
        Record.from_dict(json.loads(json.dumps(content)))
        write_json(content, path)

    @classmethod
    def from_dict(cls, content: Any) -> Record:
        """Checks everything. Raises `ValueError` that names the field that is wrong and what it must be."""
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            advice = "Upgrade with `pip install --upgrade autolora-hf`." if newer else "Save the model anew."
            raise ValueError(
                f"schema version {shown(version)}; this release of autolora_hf reads version {SCHEMA_VERSION}. "
                f"{advice}"
            )
        _RECORD(content, "")
        content = {name: value for name, value in content.items() if name != "schema_version"}
        names = content["label_names"]
        if names is not None and len(names) != content["num_classes"]:
            raise ValueError(f"label_names has {len(names)} names for {content['num_classes']} classes.")
        for route, logits in (content["fingerprint"] or {}).items():
            if [len(row) for row in logits] != [content["num_classes"]] * 2:
                raise ValueError(f"fingerprint.{route} must hold {content['num_classes']} logits for two images.")
        for name, kind in (("preprocessing", Preprocessing), ("threat_model", ThreatModel)):
            try:
                content[name] = kind(**content[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} is not valid: {error}") from error
        record = cls(**content)
        check_network(record.backbone["config"], "backbone.config")
        if sum(map(len, record.config["target_modules"])) > _MOST_CHARACTERS:
            raise ValueError(f"config.target_modules has more than {_MOST_CHARACTERS:,} characters.")
        targets = set(record.config["target_modules"])
        for name in ("rank_pattern", "alpha_pattern"):
            strangers = sorted(record.config[name].keys() - targets)
            if strangers:
                raise ValueError(f"config.{name} names {strangers[0]!r}, which is none of config.target_modules.")
        if bool(targets) != (record.mode == "adapter" or record.natural_route == "branch"):
            raise ValueError(
                f"config.target_modules names {len(targets)} layers for mode {record.mode!r} and natural_route "
                f"{record.natural_route!r}."
            )
        try:
            record.autolora_config()
        except (TypeError, ValueError) as error:
            raise ValueError(f"config is not valid: {error}") from error
        return record

    @classmethod
    def read(cls, directory: Path, name: str | None = None) -> Record:
        """The record of a saved model; `name` is what messages call it instead of the folder.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If it is damaged, of another schema version, or hostile.
        """
        path = inside(directory, RECORD)
        if not path.is_file():
            kind = ""
            if (directory / "adapter_config.json").is_file():
                kind = " It holds a plain PEFT adapter: use `PeftModel.from_pretrained`."
            elif (directory / "config.json").is_file():
                kind = " It holds a plain checkpoint: `get_autolora_model` makes a model of it that can be trained."
            raise FileNotFoundError(f"{name or directory} has no {RECORD}, so it was not saved by autolora_hf.{kind}")
        try:
            return cls.from_dict(read_json(path, _LARGEST_FILE))
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


_LAYERS = list_of(layer_name, _MOST_LAYERS, 1)
_SIDES = list_of(integer(1, 16_384), 2, 2)
_CHANNELS = list_of(number(-1e6, 1e6), 3, 3)
_LOGITS = list_of(list_of(number(-1e300, 1e300), _MOST_CLASSES, 1), 2, 2)
_VERSION = integer(SCHEMA_VERSION, SCHEMA_VERSION)


def _size(value: Any, where: str) -> None:
    _SIDES(value, where)
    if value[0] * value[1] > MOST_PIXELS:
        raise wrong(where, f"height and width of at most {MOST_PIXELS:,} pixels together", value)


_RECORD = json_object(
    {
        "schema_version": _VERSION,
        "config": json_object(
            {
                "mode": one_of("full", "adapter"),
                "layout": one_of("released", "peft"),
                "norm": one_of("shared", "robust_stats", "dual", "split", "frozen"),
                "head": either(_LAYERS, layer_name),
                "r": integer(1, _MOST_RANK),
                "lora_alpha": number(-1e6, 1e6),
                "lora_dropout": number(0, 1),
                "use_rslora": boolean,
                "rank_pattern": mapping(layer_name, integer(1, _MOST_RANK), _MOST_LAYERS),
                "alpha_pattern": mapping(layer_name, number(-1e6, 1e6), _MOST_LAYERS),
                "init_lora_weights": one_of(True, False, "gaussian"),
                "target_modules": list_of(layer_name, _MOST_LAYERS),
                "modules_to_save": optional(list_of(layer_name, _MOST_LAYERS)),
            },
            # Files of earlier releases do not have them.
            {
                "natural_route": one_of("branch", "plain", "none"),
                "stop_gradient": boolean,
                "branch": one_of(*BRANCHES),
                # Each kind checks its own, see [`AutoLoraConfig`].
                "branch_args": mapping(line, plain_json, 50),
            },
        ),
        "backbone": json_object(
            {
                "library": one_of("timm", "transformers"),
                "name_or_path": optional(line),
                "revision": optional(revision),
                "architecture": layer_name,
                "config": optional(plain_json),
                "weights_sha256": text,
            },
            {"image_size": _size, "resampled": list_of(layer_name, _MOST_LAYERS)},
        ),
        "num_classes": integer(1, _MOST_CLASSES),
        "label_names": optional(list_of(text, _MOST_CLASSES)),
        "preprocessing": json_object(
            {
                "image_size": _size,
                "mean": _CHANNELS,
                "std": _CHANNELS,
                "interpolation": text,
                "crop_pct": number(0, 2),
                "crop_mode": text,
                "channel_order": text,
            }
        ),
        "threat_model": json_object({"norm": text, "eps": number(0, 1e6)}),
        "training": optional(mapping(text, plain_json, 100)),
        "results": list_of(mapping(text, plain_json, 100), 100),
        "fingerprint": optional(mapping(one_of("robust", "natural"), _LOGITS, 2)),
        "versions": mapping(line, line, 100),
    }
)
