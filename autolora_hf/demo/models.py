"""The models of the page, and the images it offers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..config import AutoLoraConfig, ThreatModel
from ..data.folders import ClassFolder
from ..download import is_repository_name
from ..evaluation import RobustnessReport
from ..evaluation.breakdown import class_name
from ..evaluation.view import AttackView
from ..factory import get_autolora_model, load_autolora_model
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from ..pixels import Preprocessing
from ..quickstart import NATURAL_MODEL, load_digits
from ..record import RECORD
from ..routes import NATURAL, ROBUST
from ..saving import current_results
from ..towers import tower_of


ROBUST_NAME, NATURAL_NAME, ROUTE_NAME = "Robust model", "Natural fine-tuning", "Natural route"
# A folder of a saved model may hold images for its page here.
EXAMPLES = "examples"
MOST_EXAMPLES = 12


@dataclass(frozen=True, eq=False)
class Classifier:
    """One of the models of the page.

    Args:
        name (`str`): What it is called there.
        note (`str`): What it is, in a sentence.
        view (`nn.Module`): Pixels in [0, 1], N x 3 x H x W, to logits N x K; a copy that nothing else uses.
        reports (`list[RobustnessReport]`): What was measured of it, AutoAttack first.
    """

    name: str
    note: str
    view: nn.Module
    reports: list[RobustnessReport] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Demo:
    """Everything that the page shows.

    Args:
        title (`str`): Name of the model.
        classifiers (`list[Classifier]`): The robust one first, then those that it can be compared with.
        preprocessing (`Preprocessing`): What all of them expect of an image.
        threat_model (`ThreatModel`): That of the training of the robust one.
        label_names (`list[str]`, *optional*): Class names in class order.
        examples (`list[tuple[str, Image.Image]]`): Images to choose from, with what they are called.
        steps (`int`): Steps of PGD.
        seed (`int`): Of its random start.
    """

    title: str
    classifiers: list[Classifier]
    preprocessing: Preprocessing
    threat_model: ThreatModel
    label_names: list[str] | None = None
    examples: list[tuple[str, Image.Image]] = field(default_factory=list)
    steps: int = 20
    seed: int = 0

    @property
    def robust(self) -> Classifier:
        return self.classifiers[0]

    @property
    def others(self) -> list[Classifier]:
        return self.classifiers[1:]

    def shown(self, other: str | None) -> dict[str, nn.Module]:
        """The models side by side: the one called `other`, if any, and the robust one."""
        chosen = [classifier for classifier in self.others if classifier.name == other]
        return {classifier.name: classifier.view for classifier in [*chosen, self.robust]}

    def class_name(self, label: int) -> str:
        return class_name(label, self.label_names)


def open_demo(
    model: str | os.PathLike,
    *,
    natural: str | os.PathLike | None = None,
    examples: str | os.PathLike | None = None,
    steps: int = 20,
    seed: int = 0,
    device: str | torch.device | None = None,
    title: str | None = None,
    **source: Any,
) -> Demo:
    """Loads the models of a page.

    Args:
        model (`str`): Folder or Hub repository of a saved model. Its natural route, if it has one, is shown too.
        natural (`str`, *optional*): A naturally trained model to compare it with: a saved model, or a checkpoint of
            timm or transformers with the same classes and size of images. `None`: the one that the quickstart leaves
            in the folder of its model.
        examples (`str`, *optional*): Folder of images to choose from, in it or in sub-folders by class. `None`: the
            folder `examples` in that of the model; for a model that was measured on the quickstart's digits, those.
        steps (`int`): Steps of PGD.
        seed (`int`): Of its random start.
        device (*optional*): Where the models run. `None`: on the CPU.
        title (`str`, *optional*): What the page calls the model. `None`: the name of the folder or the repository.
        **source: Further arguments of [`load_autolora_model`].

    Raises:
        FileNotFoundError, ValueError: If something is missing or damaged, is no classifier, or does not belong
            together.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    robust = load_autolora_model(model, **source).to(device)
    if tower_of(robust.get_base_model()) is not None:
        raise ValueError(f"{model} gives embeddings, not classes, so there are no answers to show.")
    folder = Path(model)
    if natural is None and (folder / NATURAL_MODEL / RECORD).is_file():
        natural = folder / NATURAL_MODEL
    others = []
    if natural is not None:
        twin = _open_natural(natural, source.get("token")).to(device)
        _check_same_task(robust, twin, natural)
        others.append(Classifier(NATURAL_NAME, "Trained on clean images alone.", *_copied(twin, ROBUST)))
    if NATURAL in robust.routes:
        note = (
            "The other route of the robust model: the same backbone with the branch that learnt from clean images. "
            "It helps training and is never deployed."
        )
        others.append(Classifier(ROUTE_NAME, note, *_copied(robust, NATURAL)))
    note = f"The deployed route; the threat model of its training was {robust.threat_model}."
    name = folder.resolve().name if folder.is_dir() else str(model)
    return Demo(
        title=name if title is None else title,
        classifiers=[Classifier(ROBUST_NAME, note, *_copied(robust, ROBUST)), *others],
        preprocessing=robust.preprocessing,
        threat_model=robust.threat_model,
        label_names=robust.label_names,
        examples=_examples(folder, examples, robust),
        steps=steps,
        seed=seed,
    )


def _copied(model: AutoLoraModel, route: str) -> tuple[nn.Module, list[RobustnessReport]]:
    """A copy of one route for attacks, and what was measured of it."""
    contents = current_results(model) if route == ROBUST else []
    reports = [
        RobustnessReport.from_dict({key: value for key, value in content.items() if key != "weights_sha256"})
        for content in contents
    ]
    # The routes of a model share its layers: copies can be attacked without switching back and forth.
    return AttackView(FrozenRoute(model, route)).eval(), sorted(reports, key=lambda report: not report.publishable)


def _open_natural(name: str | os.PathLike, token: str | None) -> AutoLoraModel:
    is_saved = (Path(name) / RECORD).is_file()
    if not is_saved and not Path(name).is_dir() and is_repository_name(str(name)):
        try:
            return load_autolora_model(name, token=token)
        except FileNotFoundError:
            pass  # no model of this package, but maybe a checkpoint
    if is_saved:
        return load_autolora_model(name)
    return get_autolora_model(str(name), AutoLoraConfig(natural_route="none"), token=token).eval()


def _check_same_task(robust: AutoLoraModel, natural: AutoLoraModel, name: str | os.PathLike) -> None:
    sizes = [" x ".join(map(str, model.preprocessing.image_size)) for model in (robust, natural)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name} takes images of {sizes[1]} pixels, the robust model of {sizes[0]}: they cannot be shown the same "
            "image."
        )
    if robust.num_classes != natural.num_classes:
        raise ValueError(f"{name} has {natural.num_classes} classes, the robust model {robust.num_classes}.")
    for index, names in enumerate(zip(robust.label_names or (), natural.label_names or (), strict=False)):
        if len(set(names)) > 1:
            raise ValueError(f"Class {index} is {names[1]!r} of {name} and {names[0]!r} of the robust model.")


def _examples(model: Path, folder: str | os.PathLike | None, robust: AutoLoraModel) -> list[tuple[str, Image.Image]]:
    """Some images, evenly from all there are, with the names of their classes or files."""
    if folder is None and (model / EXAMPLES).is_dir():
        folder = model / EXAMPLES
    if folder is not None:
        images = ClassFolder(Path(folder), labelled=False)
        chosen = _spread(range(len(images)), MOST_EXAMPLES)
        paths = [Path(images.samples[index][0]) for index in chosen]
        inside = [path.parent != Path(folder).expanduser() for path in paths]
        names = [path.parent.name if is_in else path.stem for path, is_in in zip(paths, inside, strict=True)]
        return [(name, images[index][0]) for name, index in zip(names, chosen, strict=True)]
    kinds = [(result.get("dataset") or {}).get("kind") for result in robust.results]
    if "quickstart" not in kinds:
        return []
    digits = load_digits()["test"]
    # The first of each class, whatever the models say of it.
    first = [digits["label"].index(label) for label in range(10)]
    return [(str(digits[index]["label"]), digits[index]["image"]) for index in first]


def _spread(items: Sequence[int], most: int) -> list[int]:
    return [items[len(items) * number // most] for number in range(most)] if len(items) > most else list(items)
