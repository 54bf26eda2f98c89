"""Which layers get a branch, and whether every branch is alive.

Everything is decided by structure and by watching one forward pass: a branch goes on every convolution and linear
layer inside the repeated blocks (composite elements of an `nn.Sequential` or `nn.ModuleList`), so never on the stem.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .attacks.pgd import attack_mode, logits_of
from .checks import listed
from .config import AutoLoraConfig
from .layers import Use, branch_parameters, in_stock_peft, weight_name


# ---- norms ----


def statistics_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that gather running statistics while training (BatchNorm of any kind, EvoNorm), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(key.startswith("running_") and buffer is not None for key, buffer in module._buffers.items())
        and not isinstance(module, (FrozenBatchNorm2d, FrozenBatchNormAct2d))
    }


# ---- layers that get a branch ----


class _Watched(nn.Module):
    """Stands in for a layer and writes down how it is used."""

    def __init__(self, layer: nn.Module, use: Use, calls: Iterator[int]) -> None:
        super().__init__()
        self.layer, self.use, self.calls = layer, use, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.use.called, self.use.order = True, next(self.calls)
        self.use.dimensions = getattr(args[0], "ndim", 0) if args else 0
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.use.read.add(name)
            return getattr(self.layer, name)


def watch_layers(model: nn.Module, example: Tensor) -> dict[str, Use]:
    """How one forward pass uses each layer that could carry a branch: convolutions, linear layers, attention.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        example (`Tensor`): One normalised image, 1 x 3 x H x W.
    """
    uses, replaced, calls = {}, [], itertools.count(1)
    # A layer that sits in several places would get a branch in only one of them, and a weight that two layers share
    # would be changed for both when one is merged.
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    places.update(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in list(model.named_modules()):
        shared = places[id(module)] > 1 or any(places[id(p)] > 1 for p in module.parameters(recurse=False))
        inside = isinstance(_parent(model, name), (nn.MultiheadAttention, _Watched))
        if _can_carry(module) and not shared and not inside:
            uses[name] = Use()
            replaced.append((_parent(model, name), name.rpartition(".")[2], module))
            replaced[-1][0]._modules[replaced[-1][1]] = _Watched(module, uses[name], calls)
    try:
        with attack_mode(model), torch.no_grad():
            model(example)
    finally:
        for parent, child, module in replaced:
            parent._modules[child] = module
    return uses


def _can_carry(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    # A parametrised weight is computed when it is read, which may change the layer's state.
    return (convolution or isinstance(module, nn.Linear)) and module._parameters.get("weight") is not None


def block_names(model: nn.Module) -> set[str]:
    """Names of the repeated blocks: elements of a container that are themselves built of layers with parameters."""
    blocks = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            for child_name, child in module.named_children():
                layers = [m for m in child.modules() if m is not child and next(m.parameters(False), None) is not None]
                if len(layers) > 1:
                    blocks.add(f"{name}.{child_name}" if name else child_name)
    return blocks


def resolve_targets(
    model: nn.Module, heads: list[str], uses: dict[str, Use], *, stock_only: bool = False
) -> list[str]:
    """Names of the layers that get a branch, in the order of their definition.

    Every convolution and linear layer inside the repeated blocks. In a model whose blocks hold less than half of such
    weights (VGG is one plain sequence), every one but the first layer.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        heads (`list[str]`): Its classification layers, which never get a branch.
        uses (`dict[str, Use]`): What [`watch_layers`] saw; a layer that the forward pass does not use gets no branch.
        stock_only (`bool`): Only layers for which PEFT has the right LoRA layer, so that the adapter loads without
            this package; unless they hold less than half of the weights.

    Raises:
        ValueError: If there is no such layer.
    """
    modules = dict(model.named_modules())
    uses = {name: use for name, use in uses.items() if use.any and name not in heads}
    blocks = block_names(model)

    def in_block(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in blocks for depth in range(1, len(parts)))

    def weights(names: Iterable[str]) -> int:
        return sum(getattr(modules[name], weight_name(modules[name])).numel() for name in names)

    targets = [name for name in uses if in_block(name)]
    if 2 * weights(targets) < weights(uses):
        targets = list(uses)[1:]
    if stock_only:
        stock = [name for name in targets if in_stock_peft(modules[name], uses[name])]
        if 2 * weights(stock) >= weights(targets):
            targets = stock
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no layer that could carry a branch: no convolution or linear layer besides "
            f"the first one and the classification layer ({listed(heads)}) takes part in its forward pass."
        )
    return targets


def mlp_outputs(model: nn.Module, names: list[str], uses: dict[str, Use]) -> list[str]:
    """The last linear layer of the MLP of each block, among `names`.

    That is the linear layer which is called last among those of the smallest block that holds at least two of them.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        names (`list[str]`): Layers in its blocks.
        uses (`dict[str, Use]`): What [`watch_layers`] saw.
    """
    linears = [name for name in names if isinstance(model.get_submodule(name), nn.Linear) and uses[name].called]
    blocks = block_names(model)
    owned: dict[str, list[str]] = {}
    for name in linears:
        parts = name.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        for block in around:
            if block in blocks and sum(other.startswith(f"{block}.") for other in linears) > 1:
                owned.setdefault(block, []).append(name)
                break
    last = {max(group, key=lambda name: uses[name].order) for group in owned.values() if len(group) > 1}
    return [name for name in names if name in last]


def requested_targets(
    model: nn.Module, requested: str | Iterable[str], heads: list[str], uses: dict[str, Use]
) -> list[str]:
    """The layers that a user's `target_modules` names, in the order of their definition.

    Args:
        requested (`str` or `list[str]`): `"all-linear"`, a regular expression that matches whole names, or names and
            ends of names, as in PEFT.

    Raises:
        ValueError: If a layer does not exist, cannot carry a branch, is not used or is a classification layer.
    """
    kind, modules = type(model).__name__, dict(model.named_modules())
    if requested == "all-linear":
        # PEFT would take timm's heads too.
        linears = [name for name in uses if isinstance(modules[name], nn.Linear) and name not in heads]
        if not linears:
            raise ValueError(f"`target_modules='all-linear'`: {kind} has no linear layer besides its head.")
        return linears
    if isinstance(requested, str):
        try:
            found = [name for name in modules if re.fullmatch(requested, name)]
        except re.error as error:
            raise ValueError(f"`target_modules={requested!r}` is not a regular expression: {error}.") from error
        if not found:
            raise ValueError(f"`target_modules={requested!r}` matches no layer of {kind}.")
    else:
        requested = sorted(requested)
        if not requested:
            raise ValueError("`target_modules` is empty: leave it out, or name at least one layer.")
        found = [name for name in modules if any(f".{name}".endswith(f".{wanted}") for wanted in requested)]
        missing = [wanted for wanted in requested if not any(f".{name}".endswith(f".{wanted}") for name in modules)]
        if missing:
            raise ValueError(
                f"`target_modules` names layers that {kind} does not have: {listed(missing)}. Layers that can carry "
                f"a branch: {listed([name for name in uses if name not in heads])}."
            )
    in_head = [name for name in found if name in heads]
    if in_head:
        raise ValueError(f"`target_modules` includes the head {in_head[0]!r}, which both routes share and train.")
    unable = [name for name in found if name not in uses]
    if unable:
        described = [f"{name} ({type(modules[name]).__name__})" for name in unable]
        raise ValueError(
            f"`target_modules` names layers that cannot carry a branch, since they are of another kind, or they or "
            f"their weights sit in several places of the model: {listed(described)}. Those that can: "
            f"{listed([name for name in uses if name not in heads])}."
        )
    unused = [name for name in found if not uses[name].any]
    if unused:
        raise ValueError(
            f"`target_modules` names layers that the forward pass of {kind} never uses: {listed(unused)}."
        )
    return found


def requested_modules(model: nn.Module, config: AutoLoraConfig) -> list[str] | None:
    """The modules that a user's `modules_to_save` names, besides head and BatchNorm, in the order of their definition.

    Raises:
        ValueError: If one does not exist, has no weights, or overlaps with the head, a layer with a branch, a layer
            with running statistics or another one.
    """
    if not config.modules_to_save:
        return None
    modules, wanted = dict(model.named_modules()), list(config.modules_to_save)
    taken, chosen = {*config.heads, *statistics_norms(model)}, set[str]()
    for end in wanted:
        matches = [name for name in modules if f".{name}".endswith(f".{end}")]
        if not matches:
            raise ValueError(f"`modules_to_save` names {end!r}, which {type(model).__name__} does not have.")
        # An end such as "norm" may match placeholders of layers that are switched off.
        matches = [name for name in matches if next(modules[name].parameters(), None) is not None]
        if not matches:
            raise ValueError(f"`modules_to_save` names {end!r}, which has no weights.")
        chosen.update(name for name in matches if name not in taken)
    found = [name for name in modules if name in chosen]
    targets = config.target_modules or ()
    for name in found:
        others = [other for other in (*taken, *targets, *found) if other != name]
        clash = [other for other in others if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")]
        if name in targets or clash:
            raise ValueError(
                f"`modules_to_save` includes {name!r}, which overlaps with {listed(clash or [name])}: a layer has "
                "either a branch or a trained copy of its own, and the head and BatchNorm have one anyway."
            )
    return found or None


def exactly(names: Iterable[str]) -> str:
    """A `target_modules` of PEFT that matches these names and no others: a list would match ends of names too."""
    return "|".join(re.escape(name) for name in names)


def check_alive(model: nn.Module, images: Tensor) -> None:
    """Runs one forward and backward pass and raises if any branch stays out of the computation.

    A branch that the output does not depend on is *dead*: it would train nothing, silently.

    Args:
        model (`nn.Module`): The adapted model, in the route to be checked.
        images (`Tensor`): Normalised images, N x 3 x H x W.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    # Parameters that the route only passes through are blocked; the trained ones sit in the same layers.
    owners = [
        (name, parameter)
        for name, layer in layers.items()
        for adapter in layer.active_adapters
        for parameter in branch_parameters(layer, adapter).values()
        if parameter.requires_grad
    ]
    try:
        loss = logits_of(model(images)).square().sum()
    except ValueError:  # says what is wrong by itself
        raise
    except Exception as error:
        raise ValueError(
            f"This architecture is not supported: its forward fails once its layers carry a branch "
            f"({type(error).__name__}: {error})."
        ) from error
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in owners], allow_unused=True)
    pairs = zip(owners, gradients, strict=True)
    dead = list(dict.fromkeys(name for (name, _), gradient in pairs if gradient is None))
    if dead:
        raise ValueError(
            f"The logits do not depend on the weights of {listed(dead)}, so their branches would be dead. Pass the "
            "other layers as `AutoLoraConfig(target_modules=[...])`."
        )


def hidden_head_layers(model: nn.Module, heads: list[str], targets: list[str]) -> list[str]:
    """Layers with weights that sit with the head, such as the hidden ones of an MLP, and are no target of a branch.

    The library makes them afresh together with the head when the number of classes changes.
    """
    modules = dict(model.named_modules())
    containers = {name.split(".")[0] for name in heads if "." in name}
    containers -= {name.split(".")[0] for name in targets}
    return [
        name
        for name, module in modules.items()
        if name.split(".")[0] in containers and _can_carry(module) and name not in heads
    ]


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
