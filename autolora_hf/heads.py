"""Where the classification layer is, found by following the logits backwards through the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attacks.pgd import logits_of
from .checks import listed
from .towers import tower_of


def resolve_heads(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the classification layers: the last layers with weights on every way to the logits.

    One for most models; two for distilled ones (the mean of two heads), models with an auxiliary head, or CrossViT.
    Of an image tower it is the projection; without one, the last layers before the embedding.

    Args:
        model (`nn.Module`): A timm or transformers image classifier or an image tower, in eval mode.
        example (`Tensor`): One normalised image, 1 x 3 x H x W.

    Raises:
        ValueError: If there is no such layer with one output a class; the message lists what was found.
    """
    made: dict[Any, str] = {}
    modules = dict(model.named_modules())

    def remember(name: str, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                made.setdefault(tensor.grad_fn, name)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: remember(name, output))
        for name, module in modules.items()
        if next(module.parameters(), None) is not None and next(module.children(), None) is None
    ]
    try:
        # The graph starts at the image, so that it is there however much of the model is frozen.
        with torch.enable_grad():
            logits = logits_of(model(example.detach().clone().requires_grad_(True)))
    finally:
        for hook in hooks:
            hook.remove()
    heads, seen, waiting = set(), set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            heads.add(made[node])
        else:
            waiting += [below for below, _ in node.next_functions]
    classes = logits.shape[-1]
    wrong = [] if tower_of(model) else [name for name in heads if _outputs_of(modules[name]) != classes]
    if not heads or wrong:
        candidates = [name for name, module in modules.items() if _outputs_of(module) == classes]
        raise ValueError(
            f"Could not find the classification layer of {type(model).__name__}: the last layers before the "
            f"{classes} logits are {listed(sorted(heads))}. Layers with {classes} outputs: {listed(candidates)}. "
            "Create the model with a classifier (`num_classes` > 0) that ends in a linear layer or a convolution."
        )
    return [name for name in modules if name in heads]


def check_heads(model: nn.Module, wanted: list[str], example: Tensor) -> None:
    """Raises `ValueError` unless `wanted` are the classification layers of `model`, see [`resolve_heads`], and perhaps
    further layers of its classifier, such as the hidden ones of an MLP."""
    modules = dict(model.named_modules())
    shown = wanted[0] if len(wanted) == 1 else wanted
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"`head={shown!r}` must name each classification layer once. Leave it out to have it found.")
    for name in wanted:
        if name not in modules:
            raise ValueError(f"`head={name!r}` is not a layer of {type(model).__name__}.")
    heads = resolve_heads(model, example)
    wrong = [name for name in wanted if name not in heads and list(modules[name].children())]
    if wrong or not set(heads) <= set(wanted):
        kind = ", ".join(f"{name!r} is a {type(modules[name]).__name__}" for name in wrong or wanted)
        raise ValueError(
            f"`head={shown!r}` is not what gives the logits of {type(model).__name__}: {kind}; the logits come from "
            f"{listed(heads)}. Leave `head` out, or name these and further layers of the classifier."
        )


def _outputs_of(module: nn.Module) -> int | None:
    return getattr(module, "out_features", None) or getattr(module, "out_channels", None)
