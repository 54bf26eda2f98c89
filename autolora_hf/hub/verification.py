"""Verification of a release: its claims against each other, and its figures against a new measurement."""

from __future__ import annotations

import os
import secrets
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import saving
from ..download import commit_of, download
from ..evaluation import Accuracy, RobustnessReport
from ..evaluation.report_text import aligned_table, item_line
from ..factory import load_autolora_model
from ..files import inside, write_json
from ..modeling import AutoLoraModel
from ..record import Record
from .claims import Claim, card_figures, card_problems, read_claims
from .model_card import CARD
from .remeasure import Figure, MissingDataError, Sources, remeasure, unmeasured


_LARGEST_CARD = 4 << 20


class NothingPublishedError(ValueError):
    """There is no measurement that could be repeated."""


@dataclass(frozen=True)
class Check:
    """Something that must be right for the figures to mean anything, and that needs no data.

    Args:
        title (`str`): What was looked at.
        holds (`bool`): Whether it is right.
        reason (`str`): What was found.
    """

    title: str
    holds: bool
    reason: str


@dataclass
class Verification:
    """What [`verify_release`] found. `print(verification)` shows it, `save` keeps it as JSON.

    Args:
        release (`str`): What was verified.
        revision (`str`, *optional*): Its commit on the Hub.
        weights_sha256 (`str`): Digest of the weights that were measured.
        checks (`list[Check]`): What needs no data.
        figures (`list[Figure]`): One row a published figure.
        subset_seed (`int`, *optional*): Seed of the choice of images; `None` if all recorded ones were used.
        notes (`list[str]`): What else to know.
    """

    release: str
    revision: str | None
    weights_sha256: str
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    subset_seed: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every check is right, and every figure was measured again and holds."""
        checked = all(check.holds for check in self.checks)
        return checked and bool(self.figures) and all(figure.verdict == "holds" for figure in self.figures)

    @property
    def refuted(self) -> bool:
        """Whether a check is wrong, or a figure does not hold. A figure that was not or could not be measured again
        refutes nothing: then neither `holds` nor this is true."""
        checked = all(check.holds for check in self.checks)
        return not checked or any(figure.verdict == "fails" for figure in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {"holds": self.holds, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON; the file is complete or not there."""
        write_json(self.to_dict(), path)

    def __str__(self) -> str:
        head = {
            "release": self.release,
            "revision": self.revision,
            "weights": f"SHA-256 {self.weights_sha256}",
            "images": None if self.subset_seed is None else f"a subset, chosen with seed {self.subset_seed}",
        }
        blocks = ["\n".join(item_line(name, text) for name, text in head.items() if text)]
        blocks.append(
            "\n".join(
                item_line("ok" if check.holds else "FAILS", f"{check.title}: {check.reason}") for check in self.checks
            )
        )
        for measurement in dict.fromkeys(figure.measurement for figure in self.figures):
            figures = [figure for figure in self.figures if figure.measurement == measurement]
            rows = [["per cent", "claimed", "found", "p", "verdict"]]
            for figure in figures:
                verdict = figure.verdict if figure.verdict == "holds" else figure.verdict.upper()
                cells = _cell(figure.claimed), _cell(figure.measured), _p_value(figure.adjusted_p_value)
                rows.append([figure.title, *cells, verdict])
            reasons = [_sentence(figure.title, figure.reason) for figure in figures]
            blocks += [item_line("measurement", measurement), aligned_table(rows), "\n".join(reasons)]
        if self.notes:
            blocks.append("\n".join(item_line("note", text) for text in self.notes))
        blocks.append(self._conclusion())
        return "\n\n".join(block for block in blocks if block)

    def _conclusion(self) -> str:
        if self.holds:
            return f"Every figure holds ({len(self.figures)} measured again)."
        parts = []
        for verdict, word in (("fails", "wrong"), ("undecided", "undecided"), ("not re-measured", "not re-measured")):
            titles = [figure.title for figure in self.figures if figure.verdict == verdict]
            parts += [f"{' and '.join(dict.fromkeys(titles))} {word}"] if titles else []
        parts += [f"{check.title} wrong" for check in self.checks if not check.holds]
        return f"NOT VERIFIED: {', '.join(parts) or 'no figure was measured again'}."


def verify_release(
    name_or_path: str | os.PathLike,
    dataset: Any = None,
    *,
    base_model: nn.Module | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    max_samples: int | None = None,
    subset_seed: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> Verification:
    """Checks what a release says about itself, and measures its natural and robust accuracy again.

    First, without data: every result is consistent in itself and belongs to the weights that were loaded and to their
    backbone, and the figures of the card are those of the record. Then each result is repeated with the attack, threat
    model and seed that it records. If the images are those of the claim, which their digests tell, each is compared
    with itself by McNemar's exact test; other images are an independent sample, compared by Fisher's exact test.

    A figure fails if it is *lower* than claimed beyond chance: an honest measurement fails with a probability of at
    most 5 %, natural and robust accuracy together (Holm's method). Several results are not corrected for each other,
    since who publishes more of them must not be tested more mildly.

    Nothing of the release is executed, and what it says is checked before it is used.

    Args:
        name_or_path (`str`): Local folder or Hub repository.
        dataset (*optional*): Images to measure on, what [`evaluate_robustness`] takes. `None`: the recorded data, if
            they are on the Hub or the quickstart's. If there are as many images as in the recorded data, those at the
            recorded positions are used; else a random subset of the recorded number, with the class shares of the
            whole.
        base_model (`nn.Module` or `str`, *optional*): See [`load_autolora_model`].
        revision (`str`, *optional*), token (*optional*), cache_dir (*optional*), local_files_only (`bool`): For the
            Hub, see [`load_autolora_model`].
        max_samples (`int`, *optional*): Measure on a random subset of this size, for a quick check that notices
            large drops only; how large is reported.
        subset_seed (`int`, *optional*): Seed of the choice of images. `None`: drawn afresh, since a publisher who knew
            the subset could be honest about it alone.
        batch_size (`int`, *optional*): Images attacked at a time. `None`: as recorded, since the random starts of
            attacks depend on it.
        device (*optional*): Where to measure; `None`: on the CPU.
        image_column (`str`, *optional*), label_column (`str`, *optional*): Columns of the data set; found when left
            out.
        progress (`bool`): Show a progress bar an attack.

    Raises:
        FileNotFoundError, PermissionError, OSError: See [`load_autolora_model`].
        MissingDataError: A `ValueError`: the data are not public and none were given; the message names them.
        NothingPublishedError: A `ValueError`: the release publishes no measurement.
        ValueError: If the release is damaged or hostile.
    """
    for name, value, least in (("max_samples", max_samples, 1), ("subset_seed", subset_seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    directory, record = saving.fetch(name_or_path, **hub)
    commit = commit_of(directory)
    # Whatever is read from here on is of the commit whose record was read.
    hub["revision"] = commit or revision
    card = _read_card(name_or_path, directory, hub)
    if not record.results:
        raise NothingPublishedError(_nothing_to_verify(name_or_path, card))
    claims, malformed = read_claims(record)
    card_check = _card_check(card, [claim.report for claim in claims])
    model = load_autolora_model(name_or_path, base_model=base_model, **hub)
    digest = saving.deployed_digest(model)
    result = Verification(str(name_or_path), commit, digest, notes=_notes(claims, record))
    result.checks = [_record_check(claims, malformed), *_model_checks(model, record, claims, digest), card_check]
    result.subset_seed = secrets.randbelow(2**31) if subset_seed is None else subset_seed
    sources = Sources(dataset, model, image_column, label_column)
    measured, missing = False, []
    for claim in claims:
        problem = "; ".join(claim.problems) or _disowned(claim, model, record, digest)
        if problem:
            result.figures += unmeasured(claim.report, "fails", problem)
            continue
        try:
            images = sources.of(claim.report)
        except MissingDataError as error:
            missing.append(str(error))
            result.figures += unmeasured(claim.report, "not re-measured", str(error))
            continue
        result.figures += remeasure(
            model,
            claim.report,
            images,
            max_samples=max_samples,
            seed=result.subset_seed,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
        measured = True
    others = any(figure.same_images is False for figure in result.figures)
    if max_samples is None and not others:
        result.subset_seed = None  # every recorded image was used
    if dataset is None and others:
        reason = (
            "the recorded data set was read, but most of the recorded images are not where they should be in it: it "
            "is another version of the data, or the record is wrong"
        )
        result.checks.append(Check("images", False, reason))
    if missing and not measured and all(check.holds for check in result.checks):
        raise MissingDataError(missing[0])
    return result


# ---- checks ----


def _record_check(claims: Sequence[Claim], malformed: Sequence[str]) -> Check:
    wrong = sum(bool(claim.problems) for claim in claims)
    if malformed or wrong:
        counted = f"{wrong} of {len(claims) + len(malformed)} measurements contradict themselves or the model"
        return Check("record", False, " ".join([*malformed, *([f"{counted}."] if wrong else [])]))
    return Check("record", True, f"no measurement of {len(claims)} contradicts itself or the model")


def _model_checks(model: AutoLoraModel, record: Record, claims: Sequence[Claim], digest: str) -> list[Check]:
    strangers = sum(claim.weights_sha256 != digest for claim in claims)
    if strangers:
        weights = Check("weights", False, f"{strangers} of {len(claims)} measurements were made with other weights")
    else:
        weights = Check("weights", True, "their SHA-256 is that of the weights that were measured")
    if record.mode == "full":
        return [weights]
    if _same_backbone(model, record):
        return [weights, Check("backbone", True, "its SHA-256 is that of the backbone that was measured")]
    named = record.backbone["name_or_path"] or "an unnamed model"
    reason = f"its weights are not those of the backbone that was measured, {named}: the figures are not about it"
    return [weights, Check("backbone", False, reason)]


def _same_backbone(model: AutoLoraModel, record: Record) -> bool:
    return record.mode == "full" or model.backbone["weights_sha256"] == record.backbone["weights_sha256"]


def _disowned(claim: Claim, model: AutoLoraModel, record: Record, digest: str) -> str | None:
    """Why a claim is not about this model."""
    if claim.weights_sha256 != digest:
        return "measured with other weights than those of the release"
    return None if _same_backbone(model, record) else "measured on a backbone with other weights than this one"


def _notes(claims: Sequence[Claim], record: Record) -> list[str]:
    notes = []
    for claim in claims:
        if claim.report.threat_model != record.threat_model:
            notes.append(
                f"The model was trained for {record.threat_model}, a measurement is about {claim.report.threat_model}."
            )
        if not claim.report.publishable:
            notes.append(f"{claim.report.attack} overstates robustness, however well its figures can be repeated.")
    return list(dict.fromkeys(notes))


# ---- the card ----


def _read_card(name_or_path: str | os.PathLike, directory: Path, hub: dict[str, Any]) -> str | None:
    if not Path(name_or_path).is_dir():
        directory = download(str(name_or_path), [CARD], **hub)
    path = inside(directory, CARD)
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_CARD:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any model card needs.")
    return path.read_text(encoding="utf-8", errors="replace")


def _card_check(card: str | None, reports: Sequence[RobustnessReport]) -> Check:
    if card is None:
        return Check("card", True, "there is none")
    problems = card_problems(card, reports)
    if problems:
        return Check("card", False, "; ".join(problems))
    count = len(card_figures(card))
    return Check(
        "card",
        True,
        f"every figure in its metadata ({count}) and in its rows about this model is one of the record; prose, "
        "pictures and rows about other models were not compared",
    )


def _nothing_to_verify(name: str | os.PathLike, card: str | None) -> str:
    try:
        count = len(card_figures(card or ""))
    except ValueError:
        count = 0
    backed = f" Its card states figures ({count}) that no measurement backs." if count else ""
    return f"{name} publishes no measurement of itself: there is nothing to verify.{backed}"


# ---- text ----


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{100 * accuracy.value:.2f} [{100 * accuracy.low:.2f}, {100 * accuracy.high:.2f}]"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _sentence(title: str, reason: str) -> str:
    return textwrap.fill(f"{title}: {reason}{'' if reason.endswith('.') else '.'}", 100, subsequent_indent="  ")
