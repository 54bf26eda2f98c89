"""What the JSON of a robustness report must look like. It may come from a stranger."""

from __future__ import annotations

import re
from typing import Any

from ..checks import (
    boolean,
    integer,
    json_object,
    line,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    revision,
    text,
    wrong,
)


# More than any evaluation has, and few enough to be harmless.
_MOST_IMAGES, _MOST_ATTACKS, _MOST_TEXTS = 10_000_000, 100, 1000


def _digest(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{12}", value):
        raise wrong(where, "12 hexadecimal digits", value)


def _attack_settings(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    one_of(*_SETTINGS)(value.get("kind"), f"{where}.kind")
    _SETTINGS[value["kind"]](value, where)
    if value["kind"] == "pgd" and not value["random_start"] and (value["restarts"] > 1 or value["loss"] == "kl"):
        raise ValueError(f"{where}.random_start must be true with restarts or with the loss 'kl'.")


_COUNT = integer(0, _MOST_IMAGES)
_SHARE = number(0, 1)
_SECONDS = number(0, 1e12)
_SEED = integer(-(2**63), 2**64 - 1)  # what torch takes
_ACCURACY = json_object({"correct": _COUNT, "total": integer(1, _MOST_IMAGES), "low": _SHARE, "high": _SHARE})
_SETTINGS = {
    "autoattack": json_object({"kind": text}),
    "pgd-bf16": json_object({"kind": text}),
    "pgd": json_object(
        {
            "kind": text,
            "steps": integer(1, 100_000),
            "step_size": number(1e-9, 1e3),
            "loss": one_of("ce", "kl"),
            "random_start": boolean,
            "restarts": integer(1, 1000),
            "seed": _SEED,
        }
    ),
    "custom": json_object({"kind": text, "name": line}),
}
_REPORT = json_object(
    {
        "threat_model": json_object({"norm": text, "eps": number(0, 1e6)}),
        "natural": _ACCURACY,
        "robust": _ACCURACY,
        "attacks": list_of(
            json_object(
                {
                    "name": line,
                    "attacked": _COUNT,
                    "broken": _COUNT,
                    "accuracy": optional(_SHARE),
                    "seconds": _SECONDS,
                    "left_out": optional(line),
                }
            ),
            _MOST_ATTACKS,
        ),
        "protocol": one_of("autoattack", "autoattack-reduced", "custom"),
        "attack": line,
        "sample_indices": list_of(integer(0, 2**40), _MOST_IMAGES, 1),
        "natural_correct": list_of(boolean, _MOST_IMAGES, 1),
        "robust_correct": list_of(boolean, _MOST_IMAGES, 1),
        "dataset_size": integer(1, 2**40),
        "num_classes": integer(2, 200_000),
        "seed": _SEED,
        "route": optional(one_of("robust", "natural")),
        "device": line,
        "seconds": _SECONDS,
        "dataset": json_object(
            {},
            {
                "name": optional(line),
                "kind": one_of("hub", "folder", "quickstart", "memory"),
                "config": optional(line),
                "split": optional(line),
                "revision": optional(revision),
            },
        ),
        "sample_digests": list_of(_digest, _MOST_IMAGES),
        "attack_settings": list_of(_attack_settings, _MOST_ATTACKS),
        "batch_size": optional(integer(1, _MOST_IMAGES)),
        "versions": mapping(line, line, 100),
        "warnings": list_of(text, _MOST_TEXTS),
    }
)


def check_report(content: Any) -> None:
    """Checks types, ranges and lengths.

    Raises:
        ValueError: If a field is missing, unknown, of a wrong type, out of range or not of the length of the others;
            the message names it.
    """
    _REPORT(content, "")
    _check_lengths(content)


def _check_lengths(content: dict[str, Any]) -> None:
    """Raises `ValueError` if fields that are right on their own are not of the same images."""
    images = len(content["sample_indices"])
    for name in ("natural_correct", "robust_correct", "sample_digests"):
        # Reports may be without digests.
        if len(content[name]) != images and (content[name] or name != "sample_digests"):
            raise ValueError(f"{name} has {len(content[name])} entries for the {images} of sample_indices.")
    if len(set(content["sample_indices"])) < images:
        raise ValueError("sample_indices has duplicates.")
    if max(content["sample_indices"]) >= content["dataset_size"]:
        raise ValueError(
            f"sample_indices has {max(content['sample_indices'])}, but dataset_size is {content['dataset_size']}."
        )
    for name in ("natural", "robust"):
        accuracy = content[name]
        if accuracy["total"] != images:
            raise ValueError(f"{name}.total is {accuracy['total']} for the {images} images of sample_indices.")
        if accuracy["correct"] > images:
            raise ValueError(f"{name}.correct is {accuracy['correct']} of {images} images.")
        if accuracy["low"] > accuracy["high"]:
            raise ValueError(f"{name}.low must not be above {name}.high, got {accuracy['low']}, {accuracy['high']}.")
    for index, row in enumerate(content["attacks"]):
        if (row["accuracy"] is None) == (row["left_out"] is None):
            raise ValueError(f"attacks[{index}].accuracy must be given where left_out is not, and only there.")
        if not row["broken"] <= row["attacked"] <= images:
            raise ValueError(
                f"attacks[{index}].broken must be at most attacked, and that at most {images} images, got "
                f"{row['broken']} and {row['attacked']}."
            )
