"""What the JSON of a robustness report must look like. It may come from a stranger."""

from __future__ import annotations

import itertools
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


# The answers to single images.
_ANSWERS = ("labels", "natural_predicted", "robust_predicted", "natural_confidence", "robust_confidence")
# More than any evaluation has, and few enough to be harmless.
_MOST_IMAGES, _MOST_ATTACKS, _MOST_TEXTS = 10_000_000, 100, 1000


def _digest(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{12}", value):
        raise wrong(where, "12 hexadecimal digits", value)


def _sha256(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise wrong(where, "64 hexadecimal digits", value)


def _accuracy(value: Any, where: str) -> None:
    _ACCURACY_FIELDS(value, where)
    if value["correct"] > value["total"]:
        raise ValueError(f"{where}.correct is {value['correct']} of {value['total']} images.")
    if value["low"] > value["high"]:
        raise ValueError(f"{where}.low must not be above {where}.high, got {value['low']}, {value['high']}.")


def _attack_settings(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    one_of(*_SETTINGS)(value.get("kind"), f"{where}.kind")
    _SETTINGS[value["kind"]](value, where)
    if value["kind"] == "pgd" and not value["random_start"] and (value["restarts"] > 1 or value["loss"] == "kl"):
        raise ValueError(f"{where}.random_start must be true with restarts or with the loss 'kl'.")


def _figure(value: Any, where: str) -> None:
    """A number behind a finding, or several."""
    if isinstance(value, list):
        list_of(_NUMBER, 1000)(value, where)
    else:
        _NUMBER(value, where)


_MOST_CLASSES = 200_000
_CLASS = integer(0, _MOST_CLASSES - 1)
_NUMBER = number(-1e300, 1e300)
_COUNT = integer(0, _MOST_IMAGES)
_SHARE = number(0, 1)
_SECONDS = number(0, 1e12)
_SEED = integer(-(2**63), 2**64 - 1)  # what torch takes
_ACCURACY_FIELDS = json_object({"correct": _COUNT, "total": integer(1, _MOST_IMAGES), "low": _SHARE, "high": _SHARE})
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
    "custom": json_object({"kind": text, "name": line}, {"source_sha256": _sha256}),
}
_REPORT = json_object(
    {
        "threat_model": json_object({"norm": text, "eps": number(0, 1e6)}),
        "natural": _accuracy,
        "robust": _accuracy,
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
        "num_classes": integer(2, _MOST_CLASSES),
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
    },
    # Added later: reports of before are without them.
    {
        "network_sha256": optional(_sha256),
        "labels": list_of(_CLASS, _MOST_IMAGES),
        "natural_predicted": list_of(_CLASS, _MOST_IMAGES),
        "robust_predicted": list_of(_CLASS, _MOST_IMAGES),
        "natural_confidence": list_of(_SHARE, _MOST_IMAGES),
        "robust_confidence": list_of(_SHARE, _MOST_IMAGES),
        "natural_top5": optional(_accuracy),
        "robust_top5": optional(_accuracy),
        "class_names": optional(list_of(text, _MOST_CLASSES)),
        "findings": list_of(
            json_object(
                {
                    "name": line,
                    "outcome": one_of("passed", "failed", "not run"),
                    "sentence": text,
                    "figures": mapping(line, _figure, 100),
                }
            ),
            _MOST_TEXTS,
        ),
        "curve": optional(
            json_object(
                {
                    "attack": line,
                    "points": list_of(json_object({"eps": number(0, 1e6), "accuracy": _accuracy}), 1000, 2),
                }
            )
        ),
        "corruptions": list_of(
            json_object({"name": line, "severity": integer(1, 5), "accuracy": _accuracy}), _MOST_TEXTS
        ),
        "other_route": optional(json_object({"route": line, "natural": _accuracy, "robust": _accuracy})),
    },
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
    for name in ("natural_correct", "robust_correct", "sample_digests", *_ANSWERS):
        # Reports may be without digests, and older ones without the answers.
        found = len(content.get(name, []))
        if found != images and (found or name in ("natural_correct", "robust_correct")):
            raise ValueError(f"{name} has {found} entries for the {images} of sample_indices.")
    if len({len(content.get(name, [])) for name in _ANSWERS}) > 1:
        raise ValueError(f"{', '.join(_ANSWERS)} must be given together.")
    for name in _ANSWERS[:3]:
        if max(content.get(name, []), default=0) >= content["num_classes"]:
            raise ValueError(f"{name} has {max(content[name])}, but num_classes is {content['num_classes']}.")
    radii = [point["eps"] for point in (content.get("curve") or {"points": []})["points"]]
    if radii and (radii[0] != 0 or any(one >= other for one, other in itertools.pairwise(radii))):
        raise ValueError("curve.points must begin with eps 0 and go on by growing eps.")
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
    for index, row in enumerate(content["attacks"]):
        if (row["accuracy"] is None) == (row["left_out"] is None):
            raise ValueError(f"attacks[{index}].accuracy must be given where left_out is not, and only there.")
        if not row["broken"] <= row["attacked"] <= images:
            raise ValueError(
                f"attacks[{index}].broken must be at most attacked, and that at most {images} images, got "
                f"{row['broken']} and {row['attacked']}."
            )
