"""Which layers get a branch, where the head is, and whether every branch is alive.

Everything is decided by structure: the head is the layer whose output is the logits; a branch goes on every
convolution and linear layer inside the repeated blocks (composite elements of an `nn.Sequential` or `nn.ModuleList`),
so never on the stem; what cannot be right is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def statistics_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with running statistics (BatchNorm), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def logits_of_base(model: nn.Module, images: Tensor) -> Tensor:
    """Logits N x K of a bare timm or transformers classifier."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def resolve_head(model: nn.Module, example: Tensor) -> str:
    """Name of the classification layer: the linear layer whose output tensor *is* the logits.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        example (`Tensor`): One normalised image, 1 x 3 x H x W.

    Raises:
        ValueError: If no linear layer returns the logits; the message lists the candidates.
    """
    outputs: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda _module, _input, output, name=name: outputs.__setitem__(name, output))
        for name, module in linears.items()
    ]
    try:
        with torch.no_grad():
            logits = logits_of_base(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [name for name, output in outputs.items() if output is logits]
    if len(heads) == 1:
        return heads[0]
    candidates = [
        name
        for name, module in model.named_modules()
        if logits.shape[-1] in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    ]
    raise ValueError(
        f"Could not find the classification layer of {type(model).__name__}: no single linear layer returns the "
        f"{logits.shape[-1]} logits. Layers with that many outputs: {_listed(candidates)}. Pass its name as "
        "`AutoLoraConfig(head=...)`, or create the model with a classifier (`num_classes` > 0)."
    )


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


def resolve_targets(model: nn.Module, head: str) -> list[str]:
    """Names of the layers that get a branch, in forward-definition order.

    Raises:
        ValueError: If the architecture has layers for which two exact routes are not implemented, or no repeated
            block; the message names the layers.
    """
    refuse_unsupported(model)
    blocks = block_names(model)

    def in_block(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:depth]) in blocks for depth in range(1, len(parts)))

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != head and in_block(name)
    ]
    if not targets:
        layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        raise ValueError(
            f"{type(model).__name__} is not supported: no convolution or linear layer lies inside a repeated block. "
            f"Layers found: {_listed(layers)}. Pass those that shall get a branch as "
            "`AutoLoraConfig(target_modules=[...])`."
        )
    return targets


def refuse_unsupported(model: nn.Module) -> None:
    """Raises `ValueError` unless every layer is of a kind whose two routes are exact.

    Right today are ResNet-like models (plain convolutions with BatchNorm) and ViT-like ones (linear layers with
    LayerNorm).
    """
    problems: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            problems.setdefault("nn.MultiheadAttention, which reads its weights past the layers", []).append(name)
        elif isinstance(module, nn.modules.conv._ConvNd):
            if type(module) is not nn.Conv2d:
                problems.setdefault(f"convolutions of type {type(module).__name__}", []).append(name)
            elif module.groups != 1:
                problems.setdefault("grouped or depthwise convolutions", []).append(name)
            elif module.dilation != (1, 1) or module.padding_mode != "zeros":
                problems.setdefault("dilated or non-zero padded convolutions", []).append(name)
            elif module.kernel_size[0] != module.kernel_size[1]:
                problems.setdefault("convolutions with a kernel that is not square", []).append(name)
        elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            problems.setdefault(f"linear layers of type {kind}", []).append(name)
        elif isinstance(module, (nn.SyncBatchNorm, nn.InstanceNorm2d)):
            problems.setdefault(f"norm layers of type {type(module).__name__}", []).append(name)
        elif not isinstance(module, nn.modules.batchnorm._BatchNorm) and any(
            "running" in buffer_name for buffer_name, _ in module.named_buffers(recurse=False)
        ):
            problems.setdefault(f"running statistics in layers of type {type(module).__name__}", []).append(name)
    if problems:
        listed = "; ".join(f"{what} ({_listed(names)})" for what, names in problems.items())
        raise ValueError(
            f"{type(model).__name__} is not supported yet. Two exact routes are implemented for ResNet-like models "
            f"(plain convolutions with BatchNorm) and ViT-like ones (linear layers with LayerNorm); this one has "
            f"{listed}."
        )


def check_head(model: nn.Module, head: str, example: Tensor) -> None:
    """Raises `ValueError` unless `head` is a linear layer or a convolution whose output is the logits.

    Args:
        model (`nn.Module`): A timm or transformers image classifier.
        head (`str`): The name to check.
        example (`Tensor`): One normalised image, 1 x 3 x H x W.
    """
    module = dict(model.named_modules()).get(head)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        problem = "not a layer" if module is None else f"a {type(module).__name__} and not the classification layer"
        raise ValueError(f"`head={head!r}` is {problem} of {type(model).__name__}.")
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            logits = logits_of_base(model, example)
    finally:
        hook.remove()
    if not any(output.numel() == logits.numel() and torch.equal(output.view_as(logits), logits) for output in outputs):
        raise ValueError(
            f"`head={head!r}` is not the classification layer of {type(model).__name__}: its output is not the "
            "logits. A model whose logits are combined of several heads is not supported yet."
        )


def check_requested(model: nn.Module, requested: str | Iterable[str], head: str) -> None:
    """Raises `ValueError` if a layer named in `target_modules` does not exist or cannot carry a branch."""
    names = {name for name, _ in model.named_modules()}
    if isinstance(requested, str):
        # PEFT reads a string as a regular expression.
        matches = [name for name in names if re.fullmatch(requested, name)]
        if not matches:
            raise ValueError(f"`target_modules={requested!r}` matches no layer of {type(model).__name__}.")
        requested = matches
    missing = [name for name in sorted(requested) if not any(n == name or n.endswith(f".{name}") for n in names)]
    if missing:
        able = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        raise ValueError(
            f"`target_modules` names layers that {type(model).__name__} does not have: {_listed(missing)}. "
            f"Layers that can carry a branch: {_listed([name for name in able if name != head])}."
        )
    if any(head == name or head.endswith(f".{name}") for name in requested):
        raise ValueError(f"`target_modules` includes the head {head!r}, which both routes share and train in full.")


def check_alive(model: nn.Module, images: Tensor) -> None:
    """Runs one forward and backward pass and raises if any branch stays out of the computation.

    A model that reads `layer.weight` itself instead of calling the layer leaves the layer's branch *dead*: it would
    train nothing, silently.

    Args:
        model (`nn.Module`): The adapted model, in the route to be checked.
        images (`Tensor`): Normalised images, N x 3 x H x W.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    factors = {
        name: [
            parameter
            for adapter in layer.active_adapters
            for branch in (layer.lora_A, layer.lora_B)
            if adapter in branch
            for parameter in (
                branch[adapter].parameters() if isinstance(branch[adapter], nn.Module) else [branch[adapter]]
            )
        ]
        for name, layer in layers.items()
    }
    # Factors that the route only passes through are blocked; the trained ones sit in the same layers.
    owners = [(name, p) for name, parameters in factors.items() for p in parameters if p.requires_grad]
    try:
        loss = logits_of_base(model, images).square().sum()
    except Exception as error:
        raise ValueError(
            f"This architecture is not supported yet: its forward fails once its layers carry a branch "
            f"({type(error).__name__}: {error})."
        ) from error
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in owners], allow_unused=True)
    pairs = zip(owners, gradients, strict=True)
    dead = list(dict.fromkeys(name for (name, _), gradient in pairs if gradient is None))
    if dead:
        raise ValueError(
            f"This architecture is not supported yet: it uses the weights of {_listed(dead)} without calling the "
            "layers, so their branches would be dead. Pass the layers that are called as "
            "`AutoLoraConfig(target_modules=[...])`."
        )


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
