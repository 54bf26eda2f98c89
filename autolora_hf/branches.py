"""Making the branches of a model: which layers get one, PEFT's configuration, what layers share, how large it is.

What kinds there are is told in [`layers.kinds`].
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from . import targets
from .checks import listed
from .config import AutoLoraConfig
from .layers import (
    BranchKind,
    Use,
    branch_parameters,
    can_merge,
    share_factors,
    takes_patches,
    weight_name,
)


logger = logging.getLogger(__name__)

# In the square matrices that a kind of branch works with, all widths together: 1 GiB in single precision.
_MOST_VALUES = 2**28


# ---- which layers ----


def choose_targets(model: nn.Module, config: AutoLoraConfig, uses: dict[str, Use]) -> list[str]:
    """Names of the layers that get a branch, in the order of their definition.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        config (`AutoLoraConfig`): With its heads resolved; `target_modules` as the user has set it.
        uses (`dict[str, Use]`): What [`watch_layers`] saw.

    Raises:
        ValueError: If there is no layer for this kind of branch, or if the user names one that cannot carry it.
    """
    if not config.has_branches:
        return []
    kind, modules = config.kind, dict(model.named_modules())
    requested = config.target_modules
    if requested not in (None, "all"):
        found = targets.requested_targets(model, requested, config.heads, uses)
        others = [name for name in found if not kind.fits(modules[name], uses[name])]
        if requested == "all-linear":
            found = [name for name in found if name not in others]
        if not found or (others and requested != "all-linear"):
            described = [f"{name} ({type(modules[name]).__name__})" for name in others]
            raise ValueError(
                f"`target_modules` names layers that a branch of kind {kind.name!r} does not fit: "
                f"{listed(described)}. It fits {kind.where}."
            )
        return found
    if kind.name == "lora":
        stock_only = requested is None and config.mode == "adapter"
        return targets.resolve_targets(model, config.heads, uses, stock_only=stock_only)
    return _default_targets(model, config.heads, uses, kind)


def _default_targets(model: nn.Module, heads: list[str], uses: dict[str, Use], kind: BranchKind) -> list[str]:
    modules = dict(model.named_modules())
    blocks = targets.resolve_targets(model, heads, uses)
    if kind.name == "adakron":
        found = targets.mlp_outputs(model, blocks, uses)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no MLP in its blocks, after which a branch of kind 'adakron' stands by "
                "default. Name the layers that it shall follow as `target_modules=[...]`: linear layers, or "
                "convolutions, where it stands at every place."
            )
        return found
    chosen = set(blocks)
    if kind.name == "lnlora":
        chosen.update(name for name in uses if takes_patches(modules[name]) and modules[name].kernel_size != (1, 1))
    found = [name for name in uses if name in chosen and name not in heads and kind.fits(modules[name], uses[name])]
    if not found:
        described = [f"{name} ({type(modules[name]).__name__})" for name in blocks]
        raise ValueError(
            f"{type(model).__name__} has no layer for a branch of kind {kind.name!r}, which fits {kind.where}; the "
            f"layers of its blocks: {listed(described)}."
        )
    share = _weights(modules, found) / max(1, _weights(modules, {*blocks, *found}))
    if share < 0.5:
        logger.warning(
            "Branches of kind %r fit only %s, which hold %.0f %% of the weights of the blocks of this %s.",
            kind.name,
            kind.where,
            100 * share,
            type(model).__name__,
        )
    return found


def _weights(modules: dict[str, nn.Module], names: Iterable[str]) -> int:
    return sum(getattr(modules[name], weight_name(modules[name])).numel() for name in names)


# ---- how they are made ----


def check(config: AutoLoraConfig, norms: list[str], stock_layers: frozenset[str]) -> None:
    """Raises `ValueError` if the layers cannot do what the configuration asks of norms and dropout.

    Args:
        config (`AutoLoraConfig`): With its targets resolved.
        norms (`list[str]`): Layers of the model with running statistics.
        stock_layers (`frozenset[str]`): Layers for which PEFT's own LoRA layer is exact.
    """
    if config.norm != "shared" and not norms:
        raise ValueError(
            f"`norm={config.norm!r}` is about the running statistics of BatchNorm, and this model has none: "
            "use `norm='shared'`."
        )
    others = [name for name in config.target_modules if name not in stock_layers]
    if config.lora_dropout and others:
        raise ValueError(
            f"`lora_dropout={config.lora_dropout}` is not possible on {', '.join(others[:5])}"
            + (f" and {len(others) - 5} more" if len(others) > 5 else "")
            + ": their branch is a change of the weight, which has no input of its own to drop from. Leave them "
            "out of `target_modules`, or leave `lora_dropout` at 0."
        )


def peft_config(config: AutoLoraConfig, stock_layers: frozenset[str] = frozenset(), **changes: Any) -> PeftConfig:
    """PEFT's configuration of one branch.

    Args:
        config (`AutoLoraConfig`): With its targets resolved.
        stock_layers (`frozenset[str]`): Layers for which PEFT's own LoRA layer is exact.
        **changes: Further fields, such as `target_modules`.
    """
    kind = config.kind
    if kind.config is not LoraConfig:
        rank = {"r": config.r} if "r" in kind.fields else {}
        return kind.config(**{**rank, **kind.fixed, **(config.branch_args or {}), **changes})
    made = config.lora_config(**kind.fixed, **changes)
    if not kind.is_pefts:
        # PEFT calls what it finds here, a class or not.
        layer: Any = partial(_branch_layer, config, stock_layers)
        made._register_custom_module({nn.Module: layer})
    return made


def _branch_layer(
    chosen: AutoLoraConfig,
    stock_layers: frozenset[str],
    target: nn.Module,
    adapter_name: str,
    *,
    target_name: str,
    **kwargs: Any,
) -> BaseTunerLayer | None:
    """The layer with a branch around `target`; `None` for PEFT's own."""
    if chosen.branch == "lora" and chosen.layout == "peft" and target_name in stock_layers:
        return None
    if chosen.branch == "lora":
        kwargs["layout"] = chosen.layout
    return cast(Any, chosen.kind.layer)(target, adapter_name, **kwargs)


def finish(layers: dict[str, BaseTunerLayer], config: AutoLoraConfig, adapters: Iterable[str]) -> None:
    """What is to be done once every layer has its branches: shares factors, and warns of what the kind entails.

    Args:
        layers (`dict[str, BaseTunerLayer]`): The layers with a branch, by name in the base model.
        config (`AutoLoraConfig`): Of the model.
        adapters (`Iterable[str]`): The branches that each layer carries.
    """
    if config.branch == "efft":
        for adapter in adapters:
            share_factors(layers, adapter)
    if config.branch_args.get("gate") and layers:
        logger.warning(
            "The hard gate of this 'foura' branch masks gradients: the loss jumps where a rank is switched, and "
            "attacks that follow the gradient, such as PGD, see an estimate of it only. Judge its robust accuracy "
            "with AutoAttack, whose Square attack needs no gradient."
        )


def mergeable(layers: dict[str, BaseTunerLayer], adapters: list[str]) -> bool:
    """Whether `adapters` can be merged into the weights of every layer."""
    return all(can_merge(layer, adapters) for layer in layers.values())


def check_mergeable(layers: dict[str, BaseTunerLayer], config: AutoLoraConfig, adapters: list[str]) -> None:
    """Raises `ValueError` unless [`mergeable`]."""
    if not mergeable(layers, adapters):
        raise ValueError(
            f"A branch of kind {config.branch!r} depends on its input, so it cannot be merged into the weights of its "
            "layer: there is no plain model that computes the same. Save the model with `save_pretrained`, or write "
            "it as ONNX, where the branches stay."
        )


# ---- how large they are ----


def count_values(config: AutoLoraConfig, layers: dict[str, nn.Module]) -> int:
    """How many parameters one branch on these layers has, counted without memory for them.

    Args:
        config (`AutoLoraConfig`): Kind, rank and so on.
        layers (`dict[str, nn.Module]`): The layers that are to carry it, by name.

    Raises:
        ValueError: If PEFT cannot make the branch of a layer, or a branch would need matrices of excessive size;
            nothing is changed then.
    """
    kind, made = config.kind, {}
    sides = {side for layer in layers.values() for side in kind.squares(getattr(layer, weight_name(layer)))}
    if sum(side**2 for side in sides) > _MOST_VALUES:
        raise ValueError(
            f"A branch of kind {kind.name!r} works with square matrices as wide as its layers, which here have up to "
            f"{max(sides):,} channels or inputs: too much memory. Name narrower layers as `target_modules=[...]`, or "
            "use another kind."
        )
    like: dict[tuple[Any, ...], BaseTunerLayer] = {}
    for name, layer in layers.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        key = (type(layer), str(layer), rank)
        if key not in like or config.branch == "efft":
            try:
                like[key] = _made_on_meta(kind, config, layer, rank)
            except Exception as error:  # PEFT's are of many kinds
                raise ValueError(
                    f"A branch of kind {kind.name!r} cannot be made on {name}, {layer}: {error}"
                ) from error
        made[name] = like[key]
    if config.branch == "efft":
        share_factors(made, "one")
        shared = {parameter for layer in made.values() for parameter in branch_parameters(layer, "one").values()}
        return sum(parameter.numel() for parameter in shared)
    return sum(p.numel() for layer in made.values() for p in branch_parameters(layer, "one").values())


def _made_on_meta(kind: BranchKind, config: AutoLoraConfig, layer: nn.Module, rank: int) -> BaseTunerLayer:
    twin = copy.copy(layer)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"))
        for name, parameter in layer._parameters.items()
    }
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not kind.is_pefts:
            lora = LoraConfig(r=rank, init_lora_weights=config.init_lora_weights)
            made = _branch_layer(config, frozenset(), twin, "one", target_name="", r=rank, lora_alpha=1, config=lora)
            return cast(BaseTunerLayer, made)
        holder = nn.Module()
        holder.layer = twin
        ranked = {"r": rank} if kind.config is LoraConfig else {}
        inject_adapter_in_model(peft_config(config, target_modules=["layer"], **ranked), holder, "one")
        return cast(BaseTunerLayer, holder.layer)
