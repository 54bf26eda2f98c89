"""Verdicts of an evaluation on disk, batch by batch, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checks import boolean, integer, json_object, line, list_of, number, shown
from ..files import read_json, write_json


FORMAT = 3
MANIFEST = "evaluation.json"
PROBES = "answers.json"
# Answers differ by less between processors and precisions; TF32 changes the third digit.
_SAME_MODEL = 0.03


@dataclass(frozen=True)
class BatchVerdicts:
    """What one stage (the clean images, or an attack) found out about one batch.

    Args:
        stage (`str`): Name of the stage.
        sample_indices (`list[int]`): The images: positions in the data set.
        sample_digests (`list[str]`): What identifies each image, see [`sample_digest`].
        correct (`list[bool]`): For each of them, whether it is classified correctly.
        predicted (`list[int]`): The class that it is taken for.
        confidence (`list[float]`): The probability that the model gives to that class, in [0, 1].
        top5 (`list[bool]`): Whether the label is among the five most probable classes.
        seconds (`float`): Share of this batch in the wall time.
        device (`str`): Where it was measured.
    """

    stage: str
    sample_indices: list[int]
    sample_digests: list[str]
    correct: list[bool]
    predicted: list[int]
    confidence: list[float]
    top5: list[bool]
    seconds: float
    device: str


_MOST_IMAGES = 10_000_000
_VERDICTS = json_object(
    {
        "evaluation": line,
        "stage": line,
        "sample_indices": list_of(integer(0, 2**40), _MOST_IMAGES, 1),
        "sample_digests": list_of(line, _MOST_IMAGES, 1),
        "correct": list_of(boolean, _MOST_IMAGES, 1),
        "predicted": list_of(integer(0, 2**31), _MOST_IMAGES, 1),
        "confidence": list_of(number(0, 1), _MOST_IMAGES, 1),
        "top5": list_of(boolean, _MOST_IMAGES, 1),
        "seconds": number(0, 1e12),
        "device": line,
    }
)


class Checkpoint:
    """A folder with one small file a finished batch, and `evaluation.json`, which says of what evaluation they are.

    Files appear whole or not at all, are never changed, and belong to no process: another number of processes may go
    on with them. They carry a checksum, and what is damaged counts as not there.

    Args:
        folder (`str`): Where the files are; it may be new.
        evaluation (`dict`): All that the verdicts depend on, as JSON types. Compared field by field.

    Raises:
        ValueError: If the folder belongs to another evaluation; the message says in what they differ.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], evaluation: dict[str, Any]) -> None:
        self.folder, self._problems = Path(folder), []
        if self.folder.is_file():
            raise ValueError(f"`checkpoint_dir` must be a folder, but {self.folder} is a file.")
        # As it comes back from a file: tuples as lists.
        evaluation = json.loads(json.dumps({"format": FORMAT, **evaluation}))
        self.key = _digest(evaluation)
        manifest = self.folder / MANIFEST
        if manifest.exists():
            try:
                found = _unsealed(manifest)
            except ValueError as error:
                self._problems.append(f"{error} It is written anew.")
            else:
                differences = differing(found, evaluation)
                if differences:
                    raise ValueError(
                        f"{self.folder} holds the verdicts of another evaluation. They differ in "
                        f"{'; '.join(differences)}. Repeat the evaluation as it was, or choose another folder."
                    )
                return
        write_json(_sealed(evaluation), manifest)

    def check_model(self, images: list[str], answers: list[float]) -> None:
        """Raises `ValueError` if the model answers otherwise than that of the verdicts that are there.

        Args:
            images (`list[str]`): What identifies the images it was asked about. That they are others is noticed later.
            answers (`list[float]`): See [`probe`].
        """
        path = self.folder / PROBES
        if path.exists():
            try:
                earlier = _unsealed(path)
                list_of(number(-1e9, 1e9), _MOST_IMAGES)(earlier.get("answers"), f"{path}: answers")
            except ValueError as error:
                self._problems.append(f"{error} It is written anew.")
                earlier = {}
            if earlier.get("evaluation") == self.key:
                there = earlier["answers"]
                gaps = [abs(one - other) for one, other in zip(answers, there, strict=False)]
                is_other = len(answers) != len(there) or max(gaps, default=0) > _SAME_MODEL
                if earlier.get("images") == images and is_other:
                    raise ValueError(
                        f"{self.folder} holds the verdicts of another model: its weights and layers are the same, but "
                        "it answers a few images otherwise, or its gradients point elsewhere. Use another folder."
                    )
                return
        write_json(_sealed({"evaluation": self.key, "images": images, "answers": answers}), path)

    def read(
        self, key: str, stage: str, batches: list[list[int]], digests: dict[int, str] | None
    ) -> tuple[dict[int, BatchVerdicts], list[str]]:
        """The verdicts that are there of a stage, by batch, and what is wrong with the files of others.

        Args:
            key (`str`), stage (`str`): What the files of the stage begin with, and its name.
            batches (`list[list[int]]`): The images of each batch: positions in the data set.
            digests (`dict[int, str]`, *optional*): What identifies each of these images, if that is known.
        """
        # The first stage also tells what is wrong with the manifest.
        found, problems, self._problems = {}, self._problems, []
        for index, images in enumerate(batches):
            path = self._path(key, index)
            if not path.exists():
                continue
            try:
                content = _unsealed(path)
                _VERDICTS(content, "")
                if content.pop("evaluation") != self.key:
                    raise ValueError(f"{path} belongs to another evaluation.")
                verdicts = BatchVerdicts(**content)
                if len({len(value) for value in vars(verdicts).values() if isinstance(value, list)}) > 1:
                    raise ValueError(f"{path} has lists of different lengths.")
                # An earlier stage may have been measured again, with another result.
                expected = None if digests is None else [digests[image] for image in images]
                same = (verdicts.stage, verdicts.sample_indices) == (stage, images)
                if not same or expected not in (None, verdicts.sample_digests):
                    raise ValueError(f"{path} is about other images than {stage} has to be run on.")
            except ValueError as error:
                problems.append(f"{error} This batch is measured again.")
            else:
                found[index] = verdicts
        return found, problems

    def write(self, key: str, index: int, verdicts: BatchVerdicts) -> None:
        """Keeps the verdicts on batch `index` of the stage whose files begin with `key`."""
        write_json(_sealed({"evaluation": self.key, **asdict(verdicts)}), self._path(key, index))

    def _path(self, key: str, index: int) -> Path:
        return self.folder / f"{key}-batch-{index:05}.json"


def differing(one: dict[str, Any], other: dict[str, Any], places: tuple[str, str] = ("there", "here")) -> list[str]:
    """In words, the entries in which two descriptions of an evaluation differ.

    Args:
        one (`dict`), other (`dict`): JSON types.
        places (`tuple[str, str]`): Where they are, as the message says it.
    """
    return [
        part
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
        for part in _difference(name, one.get(name), other.get(name), places)
    ]


def _difference(name: str, one: Any, other: Any, places: tuple[str, str]) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [f"{name}: {part}" for part in differing(one, other, places)]
    if name.endswith("_sha256"):
        return [name.removesuffix("_sha256")]
    if isinstance(one, list) and isinstance(other, list) and max(len(one), len(other)) > 9:
        # Hundreds of numbers would tell nothing.
        common = len(set(map(str, one)) & set(map(str, other)))
        return [f"{name} ({len(one)} {places[0]}, {len(other)} {places[1]}, {common} in common)"]
    return [f"{name} ({shown(one)} {places[0]}, {shown(other)} {places[1]})"]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "sha256": _digest(content)}


def _unsealed(path: Path) -> dict[str, Any]:
    """The content of a file written with its checksum. Raises `ValueError` if it is damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{path} is damaged: its checksum does not fit.")
    return content
