"""Extraction: a low-rank robust adapter from what robust training changed in the weights of a `mode="full"` model.

For every layer that can carry a branch the change `dW = W_robust - W_base`, read as a matrix of `c_out` rows, is cut
to its first singular triples: the best approximation of that rank in the Frobenius norm (Eckart and Young, 1936). The
ranks of all layers are chosen together: triples are taken in the order of what they explain for each stored value,
`sigma^2 / (c_out + rest)`, until the adapter is as large as it may be. `docs/extraction.md` shows what that costs in
robust accuracy, and that weighting the layers by their sensitivity changes little.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import targets
from ..attacks import PGD
from ..attacks.pgd import forget_cached
from ..config import AutoLoraConfig
from ..data import same_data
from ..digests import backbone_digest
from ..evaluation import Accuracy, RobustnessReport, evaluate_robustness
from ..factory import get_autolora_model
from ..layers import branch_parameters
from ..modeling import AutoLoraModel
from ..pixels import Normalize
from ..routes import ROBUST
from .norm_statistics import adversarial_examples, checked_training_data, follow_robust_norms, set_statistics
from .weight_change import WeightChange, fixed_random_state


logger = logging.getLogger(__name__)

# A relative change of a tensor that no adapter carries is worth a warning from here on.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class SizePoint:
    """Accuracy of an adapter of one size; the base has size 0, the full model size 1.

    Args:
        size (`float`): Stored values as a share of those of the full model.
        values (`int`): Stored values: factors, head, norms with their statistics.
        natural (`Accuracy`): On clean images.
        robust (`Accuracy`): Under the attack, so an upper bound.
    """

    size: float
    values: int
    natural: Accuracy
    robust: Accuracy

    def to_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "values": self.values,
            "natural": vars(self.natural) | {"value": self.natural.value},
            "robust": vars(self.robust) | {"value": self.robust.value},
        }


@dataclass
class Extraction:
    """A low-rank robust adapter and what it keeps of the full model.

    Args:
        model (`AutoLoraModel`): Mode `adapter`. Its natural route starts as the robust one, so that a training, if one
            follows, begins as any other.
        ranks (`dict[str, int]`): Rank of each layer with a branch, by its name in the base.
        explained (`dict[str, float]`): For every layer that could have a branch, the share of the squared Frobenius
            norm of its change that the adapter carries, in [0, 1].
        total_explained (`float`): The same of all layers together, those that stay out for stock PEFT included.
        values (`int`): Stored values of the adapter: factors, head, norms with their statistics.
        full_values (`int`): Stored values of the full model.
        left_out (`dict[str, float]`): Tensors that the training changed and no adapter carries, with their relative
            change `|new - old| / max(|new|, |old|)`; largest first.
        calibration_images (`int`): Images with which running statistics were estimated anew; 0: those of the full
            model were taken over.
        points (`list[SizePoint]`): What [`extract_for_accuracy`] measured on validation data, by size.
    """

    model: AutoLoraModel
    ranks: dict[str, int]
    explained: dict[str, float]
    total_explained: float
    values: int
    full_values: int
    left_out: dict[str, float]
    calibration_images: int = 0
    points: list[SizePoint] = field(default_factory=list)

    @property
    def size(self) -> float:
        """Stored values of the adapter as a share of those of the full model."""
        return self.values / self.full_values

    def measure(self, dataset: Any, attack: Any = "autoattack", **kwargs: Any) -> RobustnessReport:
        """[`evaluate_robustness`] of the adapter on test data, remembered as one of `model.results`.

        The report is saved with the adapter and stands in its card.
        """
        report = evaluate_robustness(self.model, dataset, attack=attack, **kwargs)
        self.model.add_result(report)
        return report

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as JSON takes it; part of `model.training_plan`, so that it is saved."""
        return {
            "summary": str(self),
            "values": self.values,
            "full_values": self.full_values,
            "size": self.size,
            "ranks": self.ranks,
            "explained": self.explained,
            "total_explained": self.total_explained,
            "left_out": self.left_out,
            "calibration_images": self.calibration_images,
            "points": [point.to_dict() for point in self.points],
        }

    def __str__(self) -> str:
        return (
            f"{self.values:,} of {self.full_values:,} values ({self.size:.1%}), {len(self.ranks)} layers with ranks "
            f"{min(self.ranks.values())} to {max(self.ranks.values())}, {self.total_explained:.1%} of the squared "
            "weight change"
        )


def extract_adapter(
    model: AutoLoraModel,
    base_model: nn.Module | str | None = None,
    *,
    size: float | None = None,
    rank: int | None = None,
    calibration: Any = None,
    stock_peft: bool | None = None,
) -> Extraction:
    """Makes a low-rank robust adapter of the weight change of a `mode="full"` model.

    Head and norms with running statistics are carried whole, and so are other layers whose parameters are all vectors
    (LayerNorm, layer scales) if they changed. Equal arguments give equal adapters. Nothing that is passed is changed.

    Args:
        model (`AutoLoraModel`): Mode `full`, trained.
        base_model (`nn.Module` or `str`, *optional*): The backbone it was trained from, with as many classes, or its
            name. `None`: loaded by the name that the model has recorded. A head of another size is made afresh, which
            makes no difference: the head comes from `model`.
        size (`float`, *optional*): Largest share of the full model's stored values that the adapter may have, between
            0 and 1, head and norms included.
        rank (`int`, *optional*): Instead of `size`: this rank in every layer, or the highest that its change has.
        calibration (*optional*): Training images, as [`as_pixel_dataset`] takes them; a thousand are enough. Running
            statistics are then estimated anew on adversarial examples of them ([`recalibrate`]), which in a small
            adapter regains much of what the cut loses.
        stock_peft (`bool`, *optional*): Whether only layers get a branch for which stock PEFT has an exact LoRA layer,
            so that the adapter loads without this package. `None`: if that loses little of the change.

    Raises:
        TypeError: If `model` is no `AutoLoraModel`.
        ValueError: If `model` is of mode `adapter`, the base is of another architecture or has other weights, `size`
            is not between 0 and 1 or too small (the message says the smallest possible), both or none of `size` and
            `rank` are given, or nothing changed.
    """
    if (size is None) == (rank is None):
        raise ValueError(f"Give either `size` or `rank`, got size={size!r} and rank={rank!r}.")
    if size is not None:
        _check_share("size", size)
    elif isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}.")
    change = WeightChange(model, base_model)
    images = (
        None
        if calibration is None
        else adversarial_examples(model, checked_training_data(calibration, model, "calibration"))
    )
    return _remembered(_extract(change, size, rank, images, stock_peft), model)


def extract_for_accuracy(
    model: AutoLoraModel,
    base_model: nn.Module | str | None,
    validation: Any,
    *,
    keep: float = 0.9,
    calibration: Any = None,
    max_size: float = 0.5,
    precision: float = 0.1,
    attack: PGD | None = None,
    stock_peft: bool | None = None,
    progress: bool = False,
) -> Extraction:
    """The smallest adapter that keeps a share of the robust accuracy that training gained over the base.

    Sizes are tried by bisection of their logarithm. Where the curve is flat, robust accuracy goes up and down by
    chance, by about as much as its interval is wide: a few hundred images are the least that makes sense.

    Args:
        model, base_model, calibration, stock_peft: As in [`extract_adapter`]. The accuracy of the base is that of
            `base_model` with the head it has; pass the model that training started from.
        validation: Images that no training has seen, as [`as_pixel_dataset`] takes them. Never the test set.
        keep (`float`): Share of the gain to keep, between 0 and 1.
        max_size (`float`): Largest size to try.
        precision (`float`): The search ends when the sizes next to the answer are this close, relatively.
        attack (`PGD`, *optional*): `None`: PGD with 20 steps under the model's threat model.
        progress (`bool`): Show a progress bar for each size that is measured.

    Returns:
        The [`Extraction`]; `points` has every size that was measured, with the base (size 0) and the full model (1).

    Raises:
        ValueError: As [`extract_adapter`]; if `validation` is the test split or shares images with `calibration`; if
            training gained no robust accuracy; if even `max_size` does not keep enough, with what it keeps.
    """
    for name, share in (("keep", keep), ("max_size", max_size), ("precision", precision)):
        _check_share(name, share)
    change = WeightChange(model, base_model)
    validation = checked_training_data(validation, model, "validation")
    images = None
    if calibration is not None:
        calibration = checked_training_data(calibration, model, "calibration")
        if same_data(calibration, validation):
            raise ValueError("`calibration` shares images with `validation`, whose accuracy would then be too good.")
        images = adversarial_examples(model, calibration)
    threat_model = model.threat_model
    attack = attack or PGD(threat_model, steps=20)

    def measure(network: nn.Module, values: int) -> SizePoint:
        report = evaluate_robustness(network, validation, threat_model, attack, progress=progress, diagnostics=False)
        return SizePoint(values / change.full_values, values, report.natural, report.robust)

    base = nn.Sequential(Normalize(model.preprocessing), copy.deepcopy(change.base))
    points = [measure(base, 0), measure(model, change.full_values)]
    start, gain = points[0].robust.value, points[1].robust.value - points[0].robust.value
    if gain <= 0:
        raise ValueError(
            f"Training gained no robust accuracy: {points[1].robust} against {points[0].robust} of the base under "
            f"{attack} on {points[0].robust.total} images. There is nothing to keep."
        )

    def try_size(size: float) -> tuple[Extraction, bool]:
        extraction = _extract(change, size, None, images, stock_peft)
        point = measure(extraction.model, extraction.values)
        points.append(point)
        kept = (point.robust.value - start) / gain
        logger.info("size %.4f: robust accuracy %s, %.1f %% of the gain", point.size, point.robust, 100 * kept)
        return extraction, kept >= keep

    best, enough = try_size(max_size)
    if not enough:
        kept = (points[-1].robust.value - start) / gain
        raise ValueError(
            f"An adapter of {max_size:g} of the full size keeps {kept:.1%} of the gain in robust accuracy "
            f"({points[0].robust} to {points[1].robust}), less than the {keep:.0%} asked for. Raise `max_size`, pass "
            "`calibration`, or train what `extract_adapter` gives for another epoch or two."
        )
    low, high = change.smallest_size(stock_peft), best.size
    smallest, enough = try_size(low)
    if enough:
        best, high = smallest, low
    while high / low > 1 + precision:
        middle = math.sqrt(low * high)
        candidate, enough = try_size(middle)
        if enough:
            best, high = candidate, middle
        else:
            low = middle
    best.points = sorted(points, key=lambda point: point.values)
    return _remembered(best, model)


def _remembered(extraction: Extraction, source: AutoLoraModel) -> Extraction:
    """The extraction, written down in the training plan of its model, after how the full model was trained."""
    extraction.model.training_plan = {**(source.training_plan or {}), "extraction": extraction.to_dict()}
    return extraction


def _extract(
    change: WeightChange, size: float | None, rank: int | None, images: Tensor | None, stock_peft: bool | None
) -> Extraction:
    ranks = change.choose(size, rank, stock_peft)
    gains = change.explained(ranks)
    model = _build(change, ranks)
    used = 0 if images is None else set_statistics(model, images)
    heavy = {key: share for key, share in change.left_out.items() if share > _NEGLIGIBLE}
    if heavy:
        shown = ", ".join(f"{key} ({share:.1%})" for key, share in list(heavy.items())[:5])
        logger.warning(
            "The training changed %d tensors that no adapter carries and that stay as they were in the base: %s%s.",
            len(heavy),
            shown,
            f" and {len(heavy) - 5} more" if len(heavy) > 5 else "",
        )
    return Extraction(
        model=model,
        ranks=ranks,
        explained={name: gains.get(name, 0.0) / layer.squared_norm for name, layer in change.layers.items()},
        total_explained=sum(gains.values()) / sum(layer.squared_norm for layer in change.layers.values()),
        values=_stored_values(model),
        full_values=change.full_values,
        left_out=dict(change.left_out),
        calibration_images=used,
    )


def _build(change: WeightChange, ranks: dict[str, int]) -> AutoLoraModel:
    source = change.model
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    options: dict[str, Any] = {"modules_to_save": change.whole} if change.whole else {}
    config = AutoLoraConfig(
        mode="adapter",
        layout="peft",
        norm=source.autolora_config.norm,
        head=change.heads[0] if len(change.heads) == 1 else change.heads,
        # Alpha is the rank everywhere, so that the scale is 1 and the factors are the change itself.
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets.exactly(ranks),
        **options,
    )
    base = copy.deepcopy(change.base)
    with fixed_random_state(next(base.parameters()).device):  # the natural branch starts at random
        model = get_autolora_model(
            base,
            config,
            preprocessing=source.preprocessing,
            label_names=source.label_names,
            threat_model=source.threat_model,
        )
    origin: dict[str, Any] = {
        key: source.backbone[key] for key in ("image_size", "resampled") if key in source.backbone
    }
    if change.name == source.backbone["name_or_path"]:
        origin["revision"] = source.backbone["revision"]
    model.backbone.update(origin, name_or_path=change.name)
    model.backbone["weights_sha256"] = backbone_digest(change.old, change.heads, model.backbone)
    with torch.no_grad():
        for name, layer in model.lora_layers().items():
            part, rank = change.layers[name], ranks[name]
            # Both factors get the square root, so that both have gradients of like size if a training follows.
            root = part.sigma[:rank].sqrt()
            for side, value in (("lora_A", root[:, None] * part.right[:rank]), ("lora_B", part.left[:, :rank] * root)):
                target = branch_parameters(layer, ROBUST)[side]
                target.copy_(value.reshape(target.shape))
        for name, module in model._saved_modules().items():
            module.load_state_dict({key: change.robust[f"{name}.{key}"] for key in module.state_dict()})
    follow_robust_norms(model)
    forget_cached(model)
    return model.eval()


def _stored_values(model: AutoLoraModel) -> int:
    factors = [p for layer in model.lora_layers().values() for p in branch_parameters(layer, ROBUST).values()]
    saved = [tensor for module in model._saved_modules().values() for tensor in module.state_dict().values()]
    return sum(tensor.numel() for tensor in [*factors, *saved])


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"`{name}` is a share and must be between 0 and 1, got {share!r}.")
