"""`autolora_config.json`: what a saved model is, how to build it again, and what was measured of it.

The file may come from a stranger. Everything in it is checked for type, range and size before it is used; nothing in
it is code, a pattern to be matched or a file name to be opened.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import AutoLoraConfig, ThreatModel
from .files import inside, read_json, write_json
from .pixels import Preprocessing


SCHEMA_VERSION = 2
RECORD = "autolora_config.json"
# More than any published vision model has, and few enough to be harmless.
_MOST_LAYERS, _MOST_CLASSES, _MOST_RANK, _MOST_NODES = 5_000, 200_000, 65_536, 500_000
# The names of the layers with a branch become one regular expression, which takes a second to compile for so many
# characters.
_MOST_CHARACTERS = 250_000
_MOST_PIXELS = 2048 * 2048
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

    def rank(self, layer: str) -> int:
        """Rank of the branches of one layer."""
        return self.config["rank_pattern"].get(layer, self.config["r"])

    def autolora_config(self) -> AutoLoraConfig:
        """The configuration, with names turned into patterns that match them and nothing else."""
        patterns = {
            name: {f"^{re.escape(layer)}": value for layer, value in self.config[name].items()}
            for name in ("rank_pattern", "alpha_pattern")
        }
        names = "|".join(map(re.escape, self.config["target_modules"]))
        return AutoLoraConfig(**{**self.config, **patterns, "target_modules": names})

    def to_dict(self) -> dict[str, Any]:
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("preprocessing", "threat_model"):
            content[name] = content[name].to_dict()
        return {"schema_version": SCHEMA_VERSION, **content}

    def write(self, path: Path) -> None:
        write_json(self.to_dict(), path)

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
        try:
            record.autolora_config()
        except (TypeError, ValueError) as error:
            raise ValueError(f"config is not valid: {error}") from error
        return record

    @classmethod
    def read(cls, directory: Path) -> Record:
        """The record of a saved model.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If it is damaged, of another schema version, or hostile.
        """
        path = inside(directory, RECORD)
        if not path.is_file():
            kind = (
                " It holds a plain PEFT adapter: use `PeftModel.from_pretrained`."
                if (directory / "adapter_config.json").is_file()
                else ""
            )
            raise FileNotFoundError(f"{directory} has no {RECORD}, so it was not saved by autolora_hf.{kind}")
        try:
            return cls.from_dict(read_json(path, _LARGEST_FILE))
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


# ---- checks: functions of a value and the path of its field that raise `ValueError` ----

Check = Callable[[Any, str], None]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value in a message: short, however large it is, and without the control sequences of a terminal."""
    return _SHORT.repr(value)


def _wrong(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where[:500]} must be {wanted}, got {shown(value)}.")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > 4096:
        raise _wrong(where, "a text of at most 4096 characters", value)
    # Names are printed on terminals, and half a surrogate pair cannot be printed at all.
    if not value.isprintable() and any(
        unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in value
    ):
        raise _wrong(where, "a text without control characters", value)


def _line(value: Any, where: str) -> None:
    _text(value, where)
    if not value.isprintable():
        raise _wrong(where, "one line of printable characters", value)


def _revision(value: Any, where: str) -> None:
    # huggingface-hub makes a file name of it.
    if not isinstance(value, str) or not re.fullmatch(r"[^\s/\\]+(/[^\s/\\]+)*", value[:257]) or len(value) > 256:
        raise _wrong(where, "a branch, tag or commit", value)
    _line(value, where)
    if ".." in value:
        raise _wrong(where, "a branch, tag or commit", value)


def _name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", value[:513]) or len(value) > 512:
        raise _wrong(where, "the name of a layer, such as 'layer1.0.conv1'", value)


def _boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)


def _integer(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(where, f"an integer between {low} and {high}", value)

    return check


def _number(low: float, high: float) -> Check:
    def check(value: Any, where: str) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # The comparison is false for NaN, and exact for integers that no float holds.
        if not is_number or not low <= value <= high:
            raise _wrong(where, f"a number between {low:g} and {high:g}", value)

    return check


def _one_of(*options: Any) -> Check:
    def check(value: Any, where: str) -> None:
        # 1 == True
        if not any(value is option or (isinstance(value, str) and value == option) for option in options):
            raise _wrong(where, f"one of {', '.join(map(repr, options))}", value)

    return check


def _either(*checks: Check) -> Check:
    def check(value: Any, where: str) -> None:
        problems = []
        for one in checks:
            try:
                return one(value, where)
            except ValueError as error:
                problems.append(error)
        raise problems[-1]

    return check


def _optional(one: Check) -> Check:
    return lambda value, where: None if value is None else one(value, where)


def _list_of(one: Check, most: int, least: int = 0) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = f"{least} to {most}" if least != most else str(least)
            raise _wrong(where, f"a list of {size} entries", value)
        for index, entry in enumerate(value):
            one(entry, f"{where}[{index}]")

    return check


def _mapping(key: Check, one: Check, most: int) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _wrong(where, f"an object of at most {most} entries", value)
        for name, entry in value.items():
            key(name, f"a key of {where}")
            one(entry, f"{where}.{name}")

    return check


def _object(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    known = {**required, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where or "the file", "an object", value)
        missing, unknown = sorted(required.keys() - value.keys()), sorted(value.keys() - known.keys())
        if missing or unknown:
            what = [f"lacks {', '.join(missing)}"] if missing else []
            what += [f"has the unknown {', '.join(map(shown, unknown[:5]))}"] if unknown else []
            raise ValueError(f"{where or 'the file'} {' and '.join(what)}.")
        for name, entry in value.items():
            known[name](entry, f"{where}.{name}" if where else name)

    return check


def _plain(value: Any, where: str) -> None:
    """Bounded JSON: finite numbers, texts, and not more than a large configuration has of them."""
    waiting, nodes = [(value, 0)], 0
    while waiting:
        entry, depth = waiting.pop()
        nodes += 1
        if nodes > _MOST_NODES or depth > 20:
            raise ValueError(f"{where} is larger or deeper than any configuration is.")
        if isinstance(entry, dict):
            waiting += [(part, depth + 1) for pair in entry.items() for part in pair]
        elif isinstance(entry, list):
            waiting += [(part, depth + 1) for part in entry]
        elif isinstance(entry, str):
            _text(entry, f"a text in {where}")
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            _number(-(2.0**64), 2.0**64)(entry, f"a number in {where}")


_LAYERS = _list_of(_name, _MOST_LAYERS, 1)
_SIDES = _list_of(_integer(1, 16_384), 2, 2)
_CHANNELS = _list_of(_number(-1e6, 1e6), 3, 3)
_LOGITS = _list_of(_list_of(_number(-1e300, 1e300), _MOST_CLASSES, 1), 2, 2)
_VERSION = _integer(SCHEMA_VERSION, SCHEMA_VERSION)


def _size(value: Any, where: str) -> None:
    _SIDES(value, where)
    if value[0] * value[1] > _MOST_PIXELS:
        raise _wrong(where, f"height and width of at most {_MOST_PIXELS:,} pixels together", value)


_RECORD = _object(
    {
        "schema_version": _VERSION,
        "config": _object(
            {
                "mode": _one_of("full", "adapter"),
                "layout": _one_of("released", "peft"),
                "norm": _one_of("shared", "robust_stats", "dual"),
                "head": _either(_LAYERS, _name),
                "r": _integer(1, _MOST_RANK),
                "lora_alpha": _number(-1e6, 1e6),
                "lora_dropout": _number(0, 1),
                "use_rslora": _boolean,
                "rank_pattern": _mapping(_name, _integer(1, _MOST_RANK), _MOST_LAYERS),
                "alpha_pattern": _mapping(_name, _number(-1e6, 1e6), _MOST_LAYERS),
                "init_lora_weights": _one_of(True, False, "gaussian"),
                "target_modules": _LAYERS,
                "modules_to_save": _optional(_list_of(_name, _MOST_LAYERS)),
            }
        ),
        "backbone": _object(
            {
                "library": _one_of("timm", "transformers"),
                "name_or_path": _optional(_line),
                "revision": _optional(_revision),
                "architecture": _name,
                "config": _optional(_plain),
                "weights_sha256": _text,
            },
            {"image_size": _size, "resampled": _list_of(_name, _MOST_LAYERS)},
        ),
        "num_classes": _integer(1, _MOST_CLASSES),
        "label_names": _optional(_list_of(_text, _MOST_CLASSES)),
        "preprocessing": _object(
            {
                "image_size": _size,
                "mean": _CHANNELS,
                "std": _CHANNELS,
                "interpolation": _text,
                "crop_pct": _number(0, 2),
                "crop_mode": _text,
                "channel_order": _text,
            }
        ),
        "threat_model": _object({"norm": _text, "eps": _number(0, 1e6)}),
        "training": _optional(_mapping(_text, _plain, 100)),
        "results": _list_of(_mapping(_text, _plain, 100), 100),
        "fingerprint": _optional(_mapping(_one_of("robust", "natural"), _LOGITS, 2)),
        "versions": _mapping(_line, _line, 100),
    }
)


# ---- the network ----

# Arguments by which a configuration could make a library read files, download something or load code.
_REFUSED = re.compile(
    r"auto_map|quantization_config|.*attn_implementation.*|.*trust_remote_code.*|custom_pipelines|use_pretrained_"
    r"backbone|checkpoint.*|pretrained|pretrained_cfg_overlay|pretrained_strict|.*cache_dir|features_only|.*_file|"
    r".*experts_implementation.*|.*kernel_config.*|custom_load|transformers_weights"
)
_MOST_NUMBER, _LONGEST_SIDE = 200_000, 2048
# Images and windows whose size a library may square before it makes a layer.
_SIDE = re.compile(r".*(image|img|input|window)_size|.*resolution")
# Of the text half of models such as CLIP, which a classifier does not build.
_VOCABULARY = re.compile(r"vocab_size|.*_token_id")


def check_network(config: Any, where: str) -> None:
    """Raises `ValueError` if a library's configuration asks for more than to build a network.

    Args:
        config: Content of a `config.json` of timm or transformers; `None` if there is none.
        where (`str`): What to call it in messages.
    """
    if config is None:
        return
    if not isinstance(config, dict):
        raise _wrong(where, "an object", config)
    _plain(config, where)
    waiting = [(where, "", False, config)]
    while waiting:
        where, key, of_weights, entry = waiting.pop()
        if isinstance(entry, dict):
            for name, part in entry.items():
                # What timm notes about the weights, such as their file, plays no part without `pretrained`.
                if _REFUSED.fullmatch(name) and not of_weights and part not in (None, False, "", "eager", "sdpa"):
                    raise ValueError(
                        f"{where}.{name} is set, which is not needed to build a network and could load files or code."
                    )
                # Cut, since long names and many entries would be a long text for each entry.
                inner = f"{where[:100]}.{name[:100]}"
                waiting.append((inner, name, of_weights or name == "pretrained_cfg", part))
        elif isinstance(entry, list):
            waiting += [(where, key, of_weights, part) for part in entry]
        elif isinstance(entry, (int, float)) and not _VOCABULARY.fullmatch(key):
            if abs(entry) > (_LONGEST_SIDE if _SIDE.fullmatch(key) else _MOST_NUMBER):
                raise ValueError(f"{where} is {shown(entry)}, larger than anything that describes a network.")
