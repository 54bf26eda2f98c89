"""A frozen copy of one route: the same function with less work in each pass, for attacks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import checkpointing
from .attacks.pgd import forget_cached, logits_of
from .layers import weight_name
from .routes import ROBUST


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


class FrozenRoute(nn.Module):
    """Pixels in [0, 1] to logits, like [`AutoLoraModel.pixel_space`] in eval mode, without adapters or gradients.

    Branches are added to the weights, and BatchNorm layers are folded into the convolutions before them: exact up to
    rounding. The copy has weights of its own; [`refresh`] brings them up to date.
    """

    def __init__(self, model: AutoLoraModel, route: str = ROBUST) -> None:
        super().__init__()
        base, device = model.get_base_model(), next(model.parameters()).device
        with model.route(route), torch.no_grad():
            self.network = copy.deepcopy(base)
            # There is no memory to save that is worth a second pass in every step of an attack.
            checkpointing.disable(self.network)
            # By name: the live layer, the LoRA layer around it and the branches to add. In lists, so that the live
            # layers do not become modules of the copy.
            self._sources: dict[str, list] = {}
            for name, module in list(self.network.named_modules()):
                live = base.get_submodule(name)
                if isinstance(live, LoraLayer):
                    adapters = [] if live.disable_adapters else list(live.active_adapters)
                    self.network.set_submodule(name, module.get_base_layer())
                    self._sources[name] = [live.get_base_layer(), live, adapters]
                elif isinstance(live, ModulesToSaveWrapper):
                    self.network.set_submodule(name, module.modules_to_save[ROBUST])
                    self._sources[name] = [live.modules_to_save[ROBUST], None, []]
            for name, _ in self.network.named_modules():
                self._sources.setdefault(name, [base.get_submodule(name), None, []])
        self.normalize = model.pixel_space(route).normalize
        self.requires_grad_(False).eval()
        # The live norms that are folded, by the name of the convolution; a plain dictionary, for the same reason.
        self._norms: dict[str, nn.Module] = {}
        self.refresh()
        image = self.normalize(torch.full((1, 3, *model.preprocessing.image_size), 0.5, device=device))
        self._fold(image.to(next(self.network.parameters()).dtype))
        if any(isinstance(module, nn.Conv2d) for module in self.network.modules()):
            self.network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.normalize(pixels).to(next(self.network.parameters()).dtype)
        return logits_of(self.network(images))

    @torch.no_grad()
    def refresh(self) -> FrozenRoute:
        """Takes over the weights and statistics that the model has now."""
        for name, target in self.network.named_modules():
            source, layer, adapters = self._sources[name]
            tensors = dict(source.named_parameters(recurse=False)) | dict(source.named_buffers(recurse=False))
            for adapter in adapters:
                key = weight_name(source)
                tensors[key] = tensors[key] + layer.get_delta_weight(adapter).to(tensors[key].dtype)
            if name in self._norms:
                norm = self._norms[name]
                statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                tensors["weight"], tensors["bias"] = fuse_conv_bn_weights(tensors["weight"], source.bias, *statistics)
            for key in [*target._parameters, *target._buffers]:
                if getattr(target, key) is not None:
                    getattr(target, key).copy_(tensors[key])
        forget_cached(self.network)
        return self

    @torch.no_grad()
    def _fold(self, example: Tensor) -> None:
        """Folds every BatchNorm whose input is exactly the output of a convolution.

        Pairs are found by watching one pass, not by name. If the logits then change by more than rounding (the output
        of a convolution has another reader), nothing is folded.
        """
        before, pairs = _watch(self.network, example)
        modules = dict(self.network.named_modules())
        for conv, norm in pairs:
            if modules[conv].bias is None:
                modules[conv].bias = nn.Parameter(modules[conv].weight.new_zeros(modules[conv].out_channels), False)
            self._norms[conv] = self._sources[norm][0]
            self.network.set_submodule(norm, nn.Identity())
            self._sources[norm][0] = self.network.get_submodule(norm)
        after = logits_of(self.refresh().network(example))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * max(1.0, before.abs().max().item())):
            for conv, norm in pairs:
                self._sources[norm][0] = self._norms.pop(conv)
                self.network.set_submodule(norm, modules[norm])
                if self._sources[conv][0].bias is None:
                    modules[conv].bias = None
            self.refresh()


def _watch(network: nn.Module, example: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """The logits of one pass, and the (convolution, BatchNorm) names of which one directly feeds the other."""
    made: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    alive: list[Tensor] = []
    hooks = []
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:

            def after_conv(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                made[id(output)] = name
                alive.append(output)  # an id is an identity only while its tensor lives

            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) is nn.BatchNorm2d and module.running_mean is not None and module.affine:

            def before_norm(_module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in made:
                    pairs.append((made[id(inputs[0])], name))

            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        logits = logits_of(network(example))
    finally:
        for hook in hooks:
            hook.remove()
    convs, norms = [conv for conv, _ in pairs], [norm for _, norm in pairs]
    return logits, [(conv, norm) for conv, norm in pairs if convs.count(conv) == norms.count(norm) == 1]
