"""What full training changed in the weights of a model, and which part of it a low-rank adapter can carry."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .. import backbones, targets
from ..digests import backbone_digest
from ..layers import weight_name
from ..layout import base_tensors
from ..modeling import AutoLoraModel
from ..progress import progress_bar
from ..routes import ROBUST
from ..towers import is_recorded_tower


logger = logging.getLogger(__name__)

# Layers that stock PEFT lacks are left out if the others explain at least this share of what all would explain.
_STOCK_SHARE = 0.95


@dataclass(frozen=True)
class LayerChange:
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


class WeightChange:
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
        self.layers: dict[str, LayerChange] = {}
        carried = {f"{n}.{key}" for n in (*self.heads, *norms, *self.whole) for key in self.modules[n].state_dict()}
        for name in progress_bar(candidates, title="decomposing the weight change", unit="layer"):
            key = f"{name}.{weight_name(self.modules[name])}"
            if key in changed:
                stock = targets.in_stock_peft(self.modules[name], uses[name])
                self.layers[name] = decompose(self.old[key], self.robust[key], stock)
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

    def _usable(self, stock_only: bool) -> dict[str, LayerChange]:
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
                choices[stock_only] = greedy_ranks(
                    layers, math.floor(cast(float, size) * self.full_values + 1e-6) - self.fixed
                )
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
    with fixed_random_state():  # a head of another size starts at random
        base = backbones.load_backbone(
            name,
            model.num_classes,
            image_size=record.get("image_size"),
            library=record["library"],
            tower=is_recorded_tower(record),
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


def decompose(old: Tensor, new: Tensor, stock: bool) -> LayerChange:
    """Singular triples of `new - old` as a matrix of `c_out` rows, without those that are zero up to rounding."""
    difference = (new.double() - old.double()).flatten(1)
    if not difference.isfinite().all():
        raise ValueError("The weights of the model or of the base model are not finite.")
    left, sigma, right = torch.linalg.svd(difference, full_matrices=False)
    # A triple is defined up to a sign, which differs between linear algebra libraries: the largest entry is positive.
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    count = max(1, int((sigma > max(difference.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum()))
    left, right = left * signs, right * signs.T
    return LayerChange(left[:, :count], sigma[:count], right[:count], float(difference.square().sum()), stock)


def greedy_ranks(layers: dict[str, LayerChange], budget: int) -> dict[str, int]:
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


@contextmanager
def fixed_random_state(device: torch.device | None = None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
