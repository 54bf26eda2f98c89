"""A frozen copy of one route: the same function with less work in each pass, for attacks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import checkpointing
from .attacks.pgd import forget_cached, logits_of
from .attention import plain_attention
from .layers import can_merge, merged_tensors, patches_of, takes_patches
from .routes import ROBUST


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


logger = logging.getLogger(__name__)


class FrozenRoute(nn.Module):
    """Pixels in [0, 1] to logits, like [`AutoLoraModel.pixel_space`] in eval mode, without adapters or gradients.

    Branches are merged into the weights where that is exact, else copied, BatchNorm layers are folded into the
    convolutions before them, and on a CPU convolutions of patches side by side become linear layers: exact up to
    rounding. The copy has weights of its own; [`refresh`] brings them up to date. Autocast does not reach it: its
    precision is what `dtype` says.

    Args:
        model (`AutoLoraModel`): What to copy.
        route (`str`): Route of the model.
        fold_norms (`bool`): Fold BatchNorm layers into convolutions.
        linear_patches (`bool`): Compute convolutions of patches side by side as linear layers, on a CPU.
        channels_last (`bool`): Memory format of models with 2-d convolutions.
        dtype (`torch.dtype`, *optional*): Precision of the network, for instance `torch.bfloat16`; normalisation,
            logits and what is differentiated outside the network stay as they are. Default: the model's own, which is
            exact.
        compiled_batch (`int`, *optional*): Number of images of the batches that run through `torch.compile`; others
            run eagerly, since each size would be compiled anew. If the compiled network fails or answers otherwise,
            all batches run eagerly, with a warning.
    """

    def __init__(
        self,
        model: AutoLoraModel,
        route: str = ROBUST,
        *,
        fold_norms: bool = True,
        linear_patches: bool = True,
        channels_last: bool = True,
        dtype: torch.dtype | None = None,
        compiled_batch: int | None = None,
    ) -> None:
        super().__init__()
        base, device = model.get_base_model(), next(model.parameters()).device
        with model.route(route), torch.no_grad():
            # What layers computed in an earlier pass may be part of its graph, which cannot be copied.
            forget_cached(base)
            self.network = copy.deepcopy(base)
            # There is no memory to save that is worth a second pass in every step of an attack.
            checkpointing.disable(self.network)
            # By name: the live layer, the branch layer around it and the branches to merge. In lists, so that the
            # live layers do not become modules of the copy.
            self._sources: dict[str, list] = {}
            for name, module in list(self.network.named_modules()):
                live = base.get_submodule(name)
                if isinstance(live, BaseTunerLayer):
                    adapters = [] if live.disable_adapters else list(live.active_adapters)
                    if adapters and not can_merge(live, adapters):
                        continue  # the copy of the branch layer has parameters like any other
                    self.network.set_submodule(name, module.get_base_layer())
                    self._sources[name] = [live.get_base_layer(), live, adapters]
                elif isinstance(live, ModulesToSaveWrapper):
                    self.network.set_submodule(name, module.modules_to_save[ROBUST])
                    self._sources[name] = [live.modules_to_save[ROBUST], None, []]
            for name, _ in self.network.named_modules():
                self._sources.setdefault(name, [base.get_submodule(name), None, []])
        self.normalize = model.pixel_space(route).normalize
        # Memory that was given back, with its size.
        self._released: list[tuple[torch.UntypedStorage, int]] = []
        self.requires_grad_(False).eval()
        # The live norms that are folded, by the name of the convolution; a plain dictionary, for the same reason.
        self._norms: dict[str, nn.Module] = {}
        self.refresh()
        if fold_norms:
            image = self.normalize(torch.full((1, 3, *model.preprocessing.image_size), 0.5, device=device))
            self._fold(image.to(self.dtype))
        if dtype is not None and dtype != self.dtype:
            # From here on `refresh` folds in the precision of the model and rounds once.
            self.network.to(dtype)
        if linear_patches and device.type == "cpu":
            self._replace_patch_embeddings()
        if channels_last and any(isinstance(module, nn.Conv2d) for module in self.network.modules()):
            for tensor in [*self.network.parameters(), *self.network.buffers()]:
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self.compiled_batch = compiled_batch
        self._compiled: Callable[[Tensor], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return next(self.network.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits N x K of `pixels`, N x 3 x H x W, in the precision of the model that was copied."""
        images = self.normalize(pixels)
        with torch.autocast(pixels.device.type, enabled=False), plain_attention(pixels.device, self.dtype):
            # Without a batch to compile for, nothing here depends on the number of images: exports count on it.
            is_compiled = self.compiled_batch is not None and len(images) == self.compiled_batch
            run = self._compile(images) if is_compiled else self._run
            return run(images.to(self.dtype)).to(pixels.dtype)

    def _run(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))

    def release(self) -> None:
        """Gives the memory of the weights back; only after [`refresh`] can the copy be used again.

        Compiled code keeps it: it may rely on where the weights are.
        """
        if self._compiled is not None and self._compiled != self._run:
            return
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            storage = tensor.untyped_storage()
            if storage.size():
                self._released.append((storage, storage.size()))
                storage.resize_(0)

    @torch.no_grad()
    def refresh(self) -> FrozenRoute:
        """Takes over the weights and statistics that the model has now."""
        for storage, size in self._released:
            storage.resize_(size)
        self._released.clear()
        for name, target in self.network.named_modules():
            source, layer, adapters = self._sources[name]
            if adapters:
                tensors = merged_tensors(layer, adapters)
            else:
                tensors = dict(source.named_parameters(recurse=False)) | dict(source.named_buffers(recurse=False))
            if name in self._norms:
                norm = self._norms[name]
                statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                bias = tensors.get("bias")
                tensors["weight"], tensors["bias"] = fuse_conv_bn_weights(tensors["weight"], bias, *statistics)
            for key in [*target._parameters, *target._buffers]:
                if getattr(target, key) is not None:
                    getattr(target, key).copy_(tensors[key])
        forget_cached(self.network)
        return self

    def _compile(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The compiled network, after it was compared with the eager one once."""
        if self._compiled is None:
            # Launching thousands of small kernels is what takes time on a GPU: CUDA graphs launch them as one.
            mode = "reduce-overhead" if images.is_cuda else None
            compiled = torch.compile(self._run, dynamic=False, mode=mode)
            try:
                problem = self._difference(compiled, images.detach().to(self.dtype))
            except Exception as error:  # compilers fail with errors of every kind
                problem = f"{type(error).__name__}: {str(error)[:500]}"
            if problem:
                logger.warning("Attacks run without torch.compile, which cannot be used here (%s).", problem)
            self._compiled = self._run if problem else compiled
        return self._compiled

    def _difference(self, compiled: Callable[[Tensor], Tensor], images: Tensor) -> str:
        """What tells the compiled network from the eager one on `images`; "" if only rounding does."""
        results = []
        with torch.enable_grad():
            for run in (self._run, compiled):
                given = images.clone().requires_grad_()
                logits = run(given)
                (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), given)
                results.append((logits.detach().clone(), gradient.clone()))
        # Single entries of half precision may differ by more than the tolerance, norms do not.
        bound = 100 * torch.finfo(self.dtype).eps
        for what, eager, found in zip(("logits", "gradients"), *results, strict=True):
            gap = ((eager - found).double().norm() / eager.double().norm().clamp(min=1e-30)).item()
            if not gap <= bound:
                return f"its {what} differ by {gap:.2g} of their norm"
        return ""

    def _replace_patch_embeddings(self) -> None:
        for module in self.network.modules():
            if type(module) is nn.Conv2d and _takes_patches(module):
                # All else about the layer stays: models read its stride, its padding, its hooks.
                module.__class__ = _PatchLinear

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
            live = self._norms[conv] = self._sources[norm][0]
            rest: nn.Module = nn.Identity()
            if isinstance(live, BatchNormAct2d):
                # timm's layer of norm and activation: what follows the norm stays.
                rest = nn.Sequential(modules[norm].drop, modules[norm].act)
                for number, part in enumerate((live.drop, live.act)):
                    for name, module in part.named_modules(prefix=f"{norm}.{number}"):
                        self._sources[name] = [module, None, []]
            self.network.set_submodule(norm, rest.eval())
            self._sources[norm][0] = rest
        after = logits_of(self.refresh().network(example))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * max(1.0, before.abs().max().item())):
            for conv, norm in pairs:
                self._sources[norm][0] = self._norms.pop(conv)
                self.network.set_submodule(norm, modules[norm])
                if self._sources[conv][0].bias is None:
                    modules[conv].bias = None
            self.refresh()


def _takes_patches(conv: nn.Conv2d) -> bool:
    """Whether `conv` is worth to be computed as a linear layer, as the first one of a ViT is."""
    return takes_patches(conv) and max(conv.kernel_size) > 1


class _PatchLinear(nn.Conv2d):
    """A convolution with its kernel's own stride, computed as one matrix product: several times as fast."""

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4:
            return super().forward(images)
        found = F.linear(
            patches_of(images, cast(tuple[int, int], self.kernel_size)), self.weight.flatten(1), self.bias
        )
        return found.permute(0, 3, 1, 2)


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
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_mean is not None and module.affine:

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
