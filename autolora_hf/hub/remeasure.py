"""Repeats a published measurement, on the recorded images or on others, and compares what comes out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data import PixelDataset, as_pixel_dataset, check_class_names, load_source, stratified_subset
from ..download import is_repository_name
from ..evaluation import Accuracy, RobustnessReport, evaluate_robustness
from ..evaluation.comparison import (
    LEVEL,
    holm,
    paired_detectable_drop,
    paired_p_value,
    unpaired_detectable_drop,
    unpaired_p_value,
)
from ..evaluation.report_text import percent
from ..modeling import AutoLoraModel
from .claims import rebuild_attack


logger = logging.getLogger(__name__)

Verdict = Literal["holds", "fails", "undecided", "not re-measured"]
# What the model sees of data: a PixelDataset, or pixels and labels as tensors.
Images = PixelDataset | tuple[Tensor, Tensor]

# A stranger's record shall not decide how much memory is used.
_LARGEST_BATCH = 1024
FIGURES = ("natural", "robust")


class MissingDataError(ValueError):
    """The recorded images cannot be had without the user's help; the message names them."""


@dataclass(frozen=True)
class Figure:
    """One published figure and what became of it.

    Args:
        title (`str`): `"natural accuracy"` or `"robust accuracy"`.
        measurement (`str`): Of which measurement: attack, threat model and number of images.
        claimed (`Accuracy`): As published.
        verdict (`str`): `"holds"`; `"fails"`; `"undecided"`: the images were too few to tell; `"not re-measured"`.
        reason (`str`): Why.
        measured (`Accuracy`, *optional*): As found.
        expected (`Accuracy`, *optional*): What the claim says of the very images that were measured; `None` for other
            images.
        same_images (`bool`, *optional*): Whether the images are those of the claim.
        lost (`int`), gained (`int`): Of the same images, those claimed correct and found wrong, and the reverse.
        p_value (`float`, *optional*): Of the one-sided test that the accuracy is lower than claimed.
        adjusted_p_value (`float`, *optional*): The same, adjusted for the figures of one measurement (Holm); the
            figure fails at 5 %.
        detectable_drop (`float`, *optional*): The smallest drop that the test would have noticed with a probability of
            80 %; a share. `None`: none.
    """

    title: str
    measurement: str
    claimed: Accuracy
    verdict: Verdict
    reason: str
    measured: Accuracy | None = None
    expected: Accuracy | None = None
    same_images: bool | None = None
    lost: int = 0
    gained: int = 0
    p_value: float | None = None
    adjusted_p_value: float | None = None
    detectable_drop: float | None = None


# ---- images ----


class Sources:
    """The images of claims: those the user gave, or the recorded ones where they are public.

    Args:
        given: What [`evaluate_robustness`] takes; `None`: the recorded images.
        model (`AutoLoraModel`): Its preprocessing is used, and its classes must be those of the data.
        image_column (`str`, *optional*), label_column (`str`, *optional*): Columns of the data.
    """

    def __init__(
        self, given: Any, model: AutoLoraModel, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        self._given, self._model = given, model
        self._columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
        self._opened: dict[tuple[tuple[str, Any], ...], Images] = {}

    def of(self, report: RobustnessReport) -> Images:
        """The images to repeat a measurement on.

        Raises:
            MissingDataError: If they are not public and none were given.
            ValueError, FileNotFoundError: If they cannot be read, or have other classes than the model.
        """
        key = () if self._given is not None else tuple(sorted(report.dataset.items()))
        if key not in self._opened:
            source = _recorded(report) if self._given is None else self._given
            self._opened[key] = self._prepared(source)
        return self._opened[key]

    def _prepared(self, source: Any) -> Images:
        if isinstance(source, TensorDataset):
            source = source.tensors
        if isinstance(source, tuple):
            return source
        images = as_pixel_dataset(source, self._model.preprocessing, name="data", **self._columns)
        check_class_names(self._model.label_names, images.class_names, "data")
        return images


def _recorded(report: RobustnessReport) -> Any:
    """The data set that a report names, if anybody can have it."""
    description: Mapping[str, Any] = report.dataset
    name, kind, split = (description.get(key) for key in ("name", "kind", "split"))
    if kind == "quickstart" and split in ("train", "test"):
        # Not at the top: the quickstart publishes models itself, and so is above this module.
        from ..quickstart import load_digits

        return load_digits()[split]
    # Only names of repositories: a stranger's record shall open no file of this machine.
    if kind == "hub" and is_repository_name(name or "") and split:
        config, revision = report.dataset.get("config"), report.dataset.get("revision")
        at = f" at {revision}" if revision else ""
        logger.info("Loading the recorded data from the Hub: %s, split %s%s.", name, split, at)
        return load_source(cast(str, name), split, config=config, revision=revision)
    where = {"folder": "a folder", "hub": "a data set on the Hub", "quickstart": "the digits"}.get(
        str(kind), "data in memory"
    )
    called = " that is" + (f" called {name!r}" if name else " not named")
    parts = [f"split {split!r}"] if split else []
    parts.append(f"{len(report.sample_indices):,} of {report.dataset_size:,} images")
    raise MissingDataError(
        f"The figures were measured on {where}{called} ({', '.join(parts)}), which cannot be fetched from here. Give "
        "the images: the same ones, to compare image by image, or others of the same kind and classes."
    )


def _labels(images: Images) -> list[int]:
    return images.labels if isinstance(images, PixelDataset) else images[1].tolist()


def choose_images(
    report: RobustnessReport, labels: Sequence[int], max_samples: int | None, seed: int | None
) -> tuple[list[int], list[int] | None]:
    """Which images to measure: the recorded positions where the data are as large as the recorded data, or a subset.

    Args:
        report (`RobustnessReport`): The measurement to repeat.
        labels (`Sequence[int]`): Classes of all images there are.
        max_samples (`int`, *optional*): At most as many.
        seed (`int`, *optional*): Of the choice, where fewer are used than recorded; 0 when left out.

    Returns:
        Positions in the data, and for each the position in the report; `None` for other data.
    """
    count = min(max_samples or len(report.sample_indices), len(report.sample_indices))
    if len(labels) != report.dataset_size:
        return stratified_subset(labels, max_samples or count, seed or 0), None
    rows = list(range(len(report.sample_indices)))
    if count < len(rows):
        rows = stratified_subset([labels[index] for index in report.sample_indices], count, seed or 0)
    return [report.sample_indices[row] for row in rows], rows


# ---- measuring ----


def remeasure(
    model: AutoLoraModel,
    report: RobustnessReport,
    images: Images,
    *,
    max_samples: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[Figure]:
    """Repeats a measurement and compares natural and robust accuracy with it.

    Args:
        model (`AutoLoraModel`): The release.
        report (`RobustnessReport`): Its claim.
        images: See [`Sources`].
        max_samples (`int`, *optional*), seed (`int`, *optional*): See [`choose_images`].
        batch_size (`int`, *optional*), device (*optional*), progress (`bool`): See [`verify_release`].
    """
    positions, rows = choose_images(report, _labels(images), max_samples, seed)
    attacks: list[Any] = [rebuild_attack(settings, report.threat_model) for settings in report.attack_settings]
    can_attack = bool(attacks) and None not in attacks
    measured = evaluate_robustness(
        model,
        images,
        report.threat_model,
        attacks if can_attack else _no_attack,
        sample_indices=positions,
        batch_size=batch_size or min(report.batch_size or 128, _LARGEST_BATCH),
        seed=report.seed,
        device=device,
        progress=progress and can_attack,
        diagnostics=False,
    )
    if rows is not None:
        differing = sum(
            report.sample_digests[row] != digest for row, digest in zip(rows, measured.sample_digests, strict=True)
        )
        # Most images being the same, the others are the same ones too, decoded or resized by another version perhaps.
        # They stay in the comparison: a publisher could else spoil the digests of what he does not want compared.
        if 2 * differing > len(rows):
            rows = None
    compared = FIGURES if can_attack else FIGURES[:1]
    if rows is None:
        figures = _compare_unpaired(report, measured, compared)
    else:
        figures = _compare_paired(report, measured, rows, differing, compared)
    if not can_attack:
        reason = f"the record does not describe its attack, {report.attack!r}, so that it could be repeated"
        figures += unmeasured(report, "not re-measured", reason, FIGURES[1:])
    elif (measured.protocol, measured.attack) != (report.protocol, report.attack):
        reason = f"repeated, the attack is {measured.attack!r}; the record calls it {report.attack!r}"
        figures[1] = replace(figures[1], verdict="fails", reason=reason)
    return figures


def _no_attack(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return pixels


def unmeasured(
    report: RobustnessReport, verdict: Verdict, reason: str, names: Sequence[str] = FIGURES
) -> list[Figure]:
    """Figures of a claim that were not measured again."""
    return [Figure(f"{name} accuracy", describe(report), getattr(report, name), verdict, reason) for name in names]


def describe(report: RobustnessReport) -> str:
    """A measurement in a line: the attack as it will be repeated, threat model, images and data."""
    name, split = report.dataset.get("name"), report.dataset.get("split")
    data = f" of {name}" + (f" ({split})" if split else "") if name else ""
    return f"{report.attack.split(':')[0]}, {report.threat_model}, {len(report.sample_indices):,} images{data}"


# ---- comparing ----


def _compare_paired(
    report: RobustnessReport, measured: RobustnessReport, rows: list[int], differing: int, names: Sequence[str]
) -> list[Figure]:
    """Image by image; `rows` are the positions in `report` of the images of `measured`."""
    found = []
    for name in names:
        claimed = [getattr(report, f"{name}_correct")[row] for row in rows]
        pairs = list(zip(claimed, getattr(measured, f"{name}_correct"), strict=True))
        expected = Accuracy.from_counts(sum(claimed), len(claimed))
        lost, gained = pairs.count((True, False)), pairs.count((False, True))
        drop = paired_detectable_drop(expected, LEVEL / len(names))
        found.append((name, paired_p_value(lost, gained), drop, expected, lost, gained))
    figures = []
    adjusted = holm([p_value for _, p_value, *_ in found])
    for (name, p_value, drop, expected, lost, gained), fair in zip(found, adjusted, strict=True):
        whole = len(rows) == len(report.sample_indices)
        images = f"all {len(rows):,} images" if whole else f"{len(rows):,} of {len(report.sample_indices):,} images"
        if differing:
            images += f" (of which {differing:,} differ in their pixels)"
        if lost + gained == 0:
            reason = f"the same verdict on each of {images} of the claim"
        else:
            reason = f"on {images} of the claim, {lost} were claimed correct and found wrong, {gained} the reverse" + (
                "" if whole else f"; of these images {percent(expected.value)} were claimed correct"
            )
        certain = whole and lost + gained == 0
        verdict, more = _verdict(getattr(report, name), fair, drop, certain)
        figures.append(
            Figure(
                f"{name} accuracy",
                describe(report),
                getattr(report, name),
                verdict,
                f"{reason}{more}",
                measured=getattr(measured, name),
                expected=expected,
                same_images=True,
                lost=lost,
                gained=gained,
                p_value=p_value,
                adjusted_p_value=fair,
                detectable_drop=drop,
            )
        )
    return figures


def _compare_unpaired(report: RobustnessReport, measured: RobustnessReport, names: Sequence[str]) -> list[Figure]:
    """Two independent samples."""
    claims = [getattr(report, name) for name in names]
    found = [getattr(measured, name) for name in names]
    p_values = [unpaired_p_value(*pair) for pair in zip(claims, found, strict=True)]
    figures = []
    for name, claim, new, p_value, fair in zip(names, claims, found, p_values, holm(p_values), strict=True):
        drop = unpaired_detectable_drop(claim, new.total, LEVEL / len(names))
        verdict, more = _verdict(claim, fair, drop, certain=False)
        reason = f"compared as two samples, on {new.total:,} images that are not those of the claim"
        if verdict == "fails":
            more += ". Perhaps these images are harder than those of the claim"
        figures.append(
            Figure(
                f"{name} accuracy",
                describe(report),
                claim,
                verdict,
                f"{reason}{more}",
                measured=new,
                same_images=False,
                p_value=p_value,
                adjusted_p_value=fair,
                detectable_drop=drop,
            )
        )
    return figures


def _verdict(claimed: Accuracy, p_value: float, drop: float | None, certain: bool) -> tuple[Verdict, str]:
    """The verdict and what to add to its reason; `certain` if nothing was left to chance."""
    if p_value <= LEVEL:
        return "fails", ": lower than claimed beyond chance"
    if claimed.correct == 0:
        return "holds", ": nothing can be lower than zero"
    if certain:
        return "holds", ""
    if drop is None:
        return "undecided", ": too few to tell, even if every one were found wrong"
    return "holds", f": not lower beyond chance. A drop by {100 * drop:.1f} points would be noticed 4 times in 5"
