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
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backbones, targets
from ..attacks import PGD
from ..attacks.pgd import forget_cached
from ..config import AutoLoraConfig
from ..data import PixelDataset, as_pixel_dataset, collate, same_data, stratified_subset
from ..digests import backbone_digest
from ..evaluation import RobustnessReport, evaluate_robustness
from ..evaluation.report import Accuracy
from ..factory import get_autolora_model
from ..files import write_json
from ..frozen import FrozenRoute
from ..layers import factor, weight_name
from ..layout import base_tensors
from ..modeling import AutoLoraModel
from ..pixels import Normalize
from ..routes import ROBUST


logger = logging.getLogger(__name__)

RECORD = "extraction.json"
# Layers that stock PEFT lacks are left out if the others explain at least this share of what all would explain.
_STOCK_SHARE = 0.95
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
        """Everything but the weights, as JSON takes it."""
        return {
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

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the adapter as [`AutoLoraModel.save_pretrained`] does, and [`to_dict`] as `extraction.json`."""
        self.model.save_pretrained(directory)
        write_json(self.to_dict(), Path(directory) / RECORD)

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
    change = _WeightChange(model, base_model)
    images = None if calibration is None else _adversarial(model, _checked(calibration, model, "calibration"))
    return _extract(change, size, rank, images, stock_peft)


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

    Returns:
        The [`Extraction`]; `points` has every size that was measured, with the base (size 0) and the full model (1).

    Raises:
        ValueError: As [`extract_adapter`]; if `validation` is the test split or shares images with `calibration`; if
            training gained no robust accuracy; if even `max_size` does not keep enough, with what it keeps.
    """
    for name, share in (("keep", keep), ("max_size", max_size), ("precision", precision)):
        _check_share(name, share)
    change = _WeightChange(model, base_model)
    validation = _checked(validation, model, "validation")
    images = None
    if calibration is not None:
        calibration = _checked(calibration, model, "calibration")
        if same_data(calibration, validation):
            raise ValueError("`calibration` shares images with `validation`, whose accuracy would then be too good.")
        images = _adversarial(model, calibration)
    threat_model = model.threat_model
    attack = attack or PGD(threat_model, steps=20)

    def measure(network: nn.Module, values: int) -> SizePoint:
        report = evaluate_robustness(network, validation, threat_model, attack, progress=False)
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
    return best


def recalibrate(model: AutoLoraModel, data: Any, *, attack: PGD | None = None) -> int:
    """Estimates running statistics of the robust route anew, in place, on adversarial examples of training images.

    A cut weight change shifts what the norms see. Nothing is trained: every norm gets the mean over batches of its
    own batch statistics, with the norms before it normalising by those of the batch. (On clean images the statistics
    would be those of another distribution than the one under attack, and robust accuracy falls.)

    Args:
        model (`AutoLoraModel`): Of either mode. A model without running statistics stays as it is.
        data: Labelled training images, as [`as_pixel_dataset`] takes them; of more than 1,000 a subset with equal
            shares of the classes is used.
        attack (`PGD`, *optional*): `None`: PGD with 10 steps under the model's threat model.

    Returns:
        Number of images used; 0 if there are no running statistics.
    """
    images = _adversarial(model, _checked(data, model, "data"), attack)
    return _set_statistics(model, images)


# ---- the change of the weights ----


@dataclass(frozen=True)
class _LayerChange:
    """Singular triples of the change of one layer's weight, `left @ diag(sigma) @ right`, in float64."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    squared_norm: float
    stock: bool

    @property
    def cost(self) -> int:
        """Stored values of one rank."""
        return self.left.shape[0] + self.right.shape[1]


class _WeightChange:
    """What training changed, and which part of it an adapter can carry.

    Args:
        model (`AutoLoraModel`): Mode `full`.
        base_model (`nn.Module`, `str` or `None`): See [`extract_adapter`].
    """

    def __init__(self, model: AutoLoraModel, base_model: nn.Module | str | None) -> None:
        if not isinstance(model, AutoLoraModel):
            raise TypeError(f"`model` must be an AutoLoraModel, got {type(model).__name__}.")
        if model.autolora_config.mode != "full":
            raise ValueError(
                "The model is of mode 'adapter', so what it saves is an adapter already. Extraction makes one of a "
                "model of mode 'full'."
            )
        self.model = model
        with model.route(ROBUST):
            self.robust = {key: tensor.detach().clone() for key, tensor in base_tensors(model).items()}
        self.full_values = sum(tensor.numel() for tensor in self.robust.values())
        self.base, self.name = _load_base(model, base_model)
        self._check_base()
        record = model.backbone
        digest = backbone_digest(self.base.state_dict(), model.autolora_config.heads, record)
        if digest != record["weights_sha256"]:
            # Not wrong: the adapter then carries the difference to this base. But it has more to carry.
            logger.warning(
                "The base model has other weights than the one that training started from (their SHA-256 differ). The "
                "adapter will belong to this base model."
            )
            if isinstance(base_model, nn.Module):
                self.name = None
        self.base.to(next(model.parameters()).device).eval()
        self.old = {key: tensor.detach() for key, tensor in self.base.state_dict().items()}
        self.modules = dict(self.base.named_modules())
        self._find_layers()

    def _check_base(self) -> None:
        state = self.base.state_dict()
        classes = backbones.num_classes_of(self.base)
        if classes != self.model.num_classes:
            raise ValueError(
                f"The model has {self.model.num_classes} classes but the base model has {classes}. Create the base "
                f"model with {self.model.num_classes} classes; its head does not matter."
            )
        wrong = sorted(state.keys() ^ self.robust.keys())
        wrong += [key for key, tensor in self.robust.items() if key in state and state[key].shape != tensor.shape]
        if wrong:
            raise ValueError(
                f"The base model is of another architecture than the {self.model.backbone['architecture']} that was "
                f"trained: {len(wrong)} tensors differ in name or shape, the first is {wrong[0]!r}."
            )
        kinds = {tensor.dtype for tensor in self.robust.values()} ^ {tensor.dtype for tensor in state.values()}
        if kinds:
            raise ValueError(f"The model and the base model differ in precision ({', '.join(map(str, kinds))}).")

    def _find_layers(self) -> None:
        """Sorts everything that changed into branches, modules carried whole, and what is left out."""
        reference = next(self.base.parameters())
        size = self.model.preprocessing.image_size
        example = torch.zeros(1, 3, *size, device=reference.device, dtype=reference.dtype)
        uses = targets.watch_layers(self.base, example)
        self.heads = list(self.model.autolora_config.heads)
        in_blocks = targets.resolve_targets(self.base, self.heads, uses)
        # Hidden layers of the classifier are made afresh with the head, so that there is no change to speak of.
        self.heads = [*targets.hidden_head_layers(self.base, self.heads, in_blocks), *self.heads]
        norms = list(targets.statistics_norms(self.base))
        changed = {key for key in self.robust if not torch.equal(self.robust[key], self.old[key])}
        candidates = [name for name, use in uses.items() if use.any and name not in self.heads]
        self.whole = self._carried_whole(changed, {*self.heads, *norms}, candidates)
        self.layers: dict[str, _LayerChange] = {}
        carried = {f"{n}.{key}" for n in (*self.heads, *norms, *self.whole) for key in self.modules[n].state_dict()}
        for name in candidates:
            key = f"{name}.{weight_name(self.modules[name])}"
            if key in changed:
                stock = targets.in_stock_peft(self.modules[name], uses[name])
                self.layers[name] = _decompose(self.old[key], self.robust[key], stock)
                carried.add(key)
        if not self.layers:
            raise ValueError(
                "No layer that could carry a branch differs between the model and the base model: training changed "
                "nothing there, or the base model is the trained one."
            )
        self.fixed = sum(
            tensor.numel()
            for name in (*self.heads, *norms, *self.whole)
            for tensor in self.modules[name].state_dict().values()
        )
        left_out = {key: _relative_change(self.old[key], self.robust[key]) for key in changed - carried}
        self.left_out = dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0])))

    def _carried_whole(self, changed: set[str], saved: set[str], candidates: list[str]) -> list[str]:
        """Layers without matrices that changed, such as LayerNorms, besides `saved`, which are carried anyway."""
        vectors = {
            name
            for name, module in self.modules.items()
            if _only_vectors(module) and name not in {*saved, *candidates}
        }
        whole: set[str] = set()
        for name in vectors:
            if changed & {f"{name}.{key}" for key in self.modules[name].state_dict()}:
                # `modules_to_save` matches the ends of names: what else ends like this one comes along, if it can.
                alike = {other for other in self.modules if f".{other}".endswith(f".{name}")} - saved
                if alike <= vectors:
                    whole |= alike
        return [name for name in self.modules if name in whole]

    def smallest_size(self, stock_peft: bool | None) -> float:
        """Smallest share of the full model's values with which [`extract_adapter`] succeeds: head, norms, one rank."""
        usable = self._usable(True) or self._usable(False) if stock_peft is None else self._usable(stock_peft)
        return (self.fixed + min(layer.cost for layer in usable.values())) / self.full_values

    def _usable(self, stock_only: bool) -> dict[str, _LayerChange]:
        return {name: layer for name, layer in self.layers.items() if layer.stock or not stock_only}

    def explained(self, ranks: dict[str, int]) -> dict[str, float]:
        """Squared norm of the change that branches of these ranks carry, by layer."""
        return {name: float(self.layers[name].sigma[:rank].square().sum()) for name, rank in ranks.items()}

    def choose(self, size: float | None, rank: int | None, stock_peft: bool | None) -> dict[str, int]:
        """Ranks by layer, without those of rank 0."""
        choices = {}
        for stock_only in (True, False) if stock_peft is None else (stock_peft,):
            layers = self._usable(stock_only)
            if not layers:
                if stock_peft:
                    raise ValueError(
                        "`stock_peft=True`, but stock PEFT has an exact LoRA layer for none that changed."
                    )
                continue
            if rank is not None:
                choices[stock_only] = {name: min(rank, len(layer.sigma)) for name, layer in layers.items()}
            else:
                choices[stock_only] = _greedy(layers, math.floor(size * self.full_values + 1e-6) - self.fixed)
        gains = {key: sum(self.explained(ranks).values()) for key, ranks in choices.items()}
        if not any(choices.values()):
            smallest = self.smallest_size(stock_peft)
            raise ValueError(
                f"`size={size:g}` is too small: head and norms alone have {self.fixed:,} of the full model's "
                f"{self.full_values:,} values. The smallest size with one branch is {math.ceil(smallest * 1e5) / 1e5}."
            )
        stock_only = max(choices) if len(choices) == 1 else gains[True] >= _STOCK_SHARE * gains[False]
        if stock_peft is None and not stock_only:
            logger.warning(
                "Layers for which stock PEFT has no exact LoRA layer get branches too, since without them the adapter "
                "would carry %.0f %% less of the weight change; it loads with this package only. `stock_peft=True` "
                "leaves them out.",
                100 * (1 - gains.get(True, 0) / gains[False]),
            )
        return choices[stock_only]


def _load_base(model: AutoLoraModel, base_model: nn.Module | str | None) -> tuple[nn.Module, str | None]:
    """A private copy of the base, and the name by which it can be found."""
    record = model.backbone
    if isinstance(base_model, nn.Module):
        return copy.deepcopy(base_model), record["name_or_path"]
    name = base_model or record["name_or_path"]
    if name is None:
        raise ValueError(
            f"The model was trained from a {record['architecture']} that was created in memory, so its weights cannot "
            "be found by name: pass it, as it was before training, as `base_model=`."
        )
    with _fixed_random_state():  # a head of another size starts at random
        base = backbones.load_backbone(
            name,
            model.num_classes,
            image_size=record.get("image_size"),
            library=record["library"],
            revision=record["revision"] if name == record["name_or_path"] else None,
        )
    return base, name


def _only_vectors(module: nn.Module) -> bool:
    """A layer such as a norm or a layer scale: nothing inside, and no parameter that a low rank could shorten."""
    parameters = list(module.parameters())
    return not list(module.children()) and bool(parameters) and all(parameter.ndim <= 1 for parameter in parameters)


def _relative_change(old: Tensor, new: Tensor) -> float:
    old, new = old.double(), new.double()
    # Not by the old one alone: biases often start at zero.
    return float((new - old).norm() / max(old.norm(), new.norm(), torch.finfo(torch.float64).tiny))


def _decompose(old: Tensor, new: Tensor, stock: bool) -> _LayerChange:
    """Singular triples of `new - old` as a matrix of `c_out` rows, without those that are zero up to rounding."""
    difference = (new.double() - old.double()).flatten(1)
    if not difference.isfinite().all():
        raise ValueError("The weights of the model or of the base model are not finite.")
    left, sigma, right = torch.linalg.svd(difference, full_matrices=False)
    # A triple is defined up to a sign, which differs between linear algebra libraries: the largest entry is positive.
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    count = max(1, int((sigma > max(difference.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum()))
    left, right = left * signs, right * signs.T
    return _LayerChange(left[:, :count], sigma[:count], right[:count], float(difference.square().sum()), stock)


def _greedy(layers: dict[str, _LayerChange], budget: int) -> dict[str, int]:
    """Ranks of which no budget allows more squared norm an extra value, triple by triple; without those of rank 0.

    A triple that does not fit is passed over, for smaller ones that do. A larger budget never explains less: where it
    first differs it takes a triple that did not fit, which outweighs all that fitted into less room at a lower rate.
    """
    order = sorted(
        (-(float(sigma) ** 2) / layer.cost, position, index, name)
        for position, (name, layer) in enumerate(layers.items())
        for index, sigma in enumerate(layer.sigma)
    )
    ranks: Counter[str] = Counter()
    for _, _, index, name in order:
        if layers[name].cost <= budget and ranks[name] == index:
            ranks[name] += 1
            budget -= layers[name].cost
    return {name: ranks[name] for name in layers if ranks[name]}


# ---- the adapter ----


def _extract(
    change: _WeightChange, size: float | None, rank: int | None, images: Tensor | None, stock_peft: bool | None
) -> Extraction:
    ranks = change.choose(size, rank, stock_peft)
    gains = change.explained(ranks)
    model = _build(change, ranks)
    used = 0 if images is None else _set_statistics(model, images)
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


def _build(change: _WeightChange, ranks: dict[str, int]) -> AutoLoraModel:
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
    with _fixed_random_state(next(base.parameters()).device):  # the natural branch starts at random
        model = get_autolora_model(
            base,
            config,
            preprocessing=source.preprocessing,
            label_names=source.label_names,
            threat_model=source.threat_model,
        )
    origin = {key: source.backbone[key] for key in ("image_size", "resampled") if key in source.backbone}
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
                target = factor(layer, side, ROBUST)
                target.copy_(value.reshape(target.shape))
        for name, module in model._saved_modules().items():
            module.load_state_dict({key: change.robust[f"{name}.{key}"] for key in module.state_dict()})
    _follow_robust_norms(model)
    forget_cached(model)
    return model.eval()


def _stored_values(model: AutoLoraModel) -> int:
    factors = [factor(layer, side, ROBUST) for layer in model.lora_layers().values() for side in ("lora_A", "lora_B")]
    saved = [tensor for module in model._saved_modules().values() for tensor in module.state_dict().values()]
    return sum(tensor.numel() for tensor in [*factors, *saved])


def _follow_robust_norms(model: AutoLoraModel) -> None:
    """With `norm="dual"` the natural set starts as the robust one."""
    saved = model._saved_modules()
    for name, norm in model.natural_norms.items():
        norm.load_state_dict(saved[name.replace("/", ".")].state_dict())


# ---- running statistics ----


def _adversarial(
    model: AutoLoraModel, data: PixelDataset, attack: PGD | None = None, *, most: int = 1000, batch_size: int = 125
) -> Tensor:
    """Adversarial examples of the robust route, N x 3 x H x W, shuffled, of at most `most` images."""
    chosen = stratified_subset(data.labels, min(most, len(data)), seed=0)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    attack, target = attack or PGD(model.threat_model), FrozenRoute(model, ROBUST)
    found = []
    for part in order.split(batch_size):
        batch = collate([data[chosen[index]] for index in part.tolist()])
        found.append(attack(target, batch["pixel_values"].to(device), batch["labels"].to(device)))
    return torch.cat(found)


@torch.no_grad()
def _set_statistics(model: AutoLoraModel, pixels: Tensor, batch_size: int = 125) -> int:
    norms = [
        module
        for name, module in targets.statistics_norms(model.get_base_model()).items()
        if not name.endswith(".original_module") and hasattr(module, "momentum")
    ]
    if not norms:
        return 0
    before = [(norm.momentum, norm.training) for norm in norms]
    view = model.pixel_space(ROBUST)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        # Equal parts, since each counts the same.
        for count, batch in enumerate(pixels.chunk(math.ceil(len(pixels) / batch_size)), start=1):
            for norm in norms:
                norm.momentum = 1 / count
            view(batch)
    finally:
        for module, training in modes:
            module.training = training
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training
    if model.autolora_config.mode == "adapter":
        _follow_robust_norms(model)
    forget_cached(model)
    return len(pixels)


# ---- checks ----


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"`{name}` is a share and must be between 0 and 1, got {share!r}.")


def _checked(data: Any, model: AutoLoraModel, name: str) -> PixelDataset:
    split = str(getattr(data, "split", None) or "")
    if split.split("[")[0].split("+")[0] == "test":
        raise ValueError(
            f"`{name}` is the 'test' split. It would shape the adapter, so the reported test accuracy would be too "
            "good. Pass images that were held out of the training set, and give the test split to `measure`."
        )
    return data if isinstance(data, PixelDataset) else as_pixel_dataset(data, model.preprocessing, name=name)


@contextmanager
def _fixed_random_state(device: torch.device | None = None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
