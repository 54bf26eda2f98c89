"""`AutoLoraModel`: a PEFT model with two routes."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from . import backbones, branches, checkpointing, saving, targets
from .attacks.pgd import forget_cached
from .checks import text
from .config import AutoLoraConfig, ThreatModel
from .layers import branch_parameters, fix_statistics
from .pixel_model import PixelModel
from .pixels import Preprocessing
from .routes import NATURAL, ROBUST, Route, RouteSwitch


if TYPE_CHECKING:
    from .evaluation import RobustnessReport


class AutoLoraModel(checkpointing.Checkpointed, PeftModel):
    """A vision classifier with a deployed robust route and, unless it is left out, a natural route for training
    (AutoLoRa, Xu et al., ICLR 2024).

    `model(pixel_values)` runs the deployed route on *normalised* images, as the base model would;
    [`~AutoLoraModel.pixel_space`] is the same function of pixels in [0, 1]. Make one with [`get_autolora_model`].

    Attributes:
        autolora_config (`AutoLoraConfig`): Mode, layout and norm handling, with every choice resolved.
        preprocessing (`Preprocessing`): What the checkpoint expects of an image.
        threat_model (`ThreatModel`): What the model is trained, or was trained, to withstand.
        label_names (`list[str]`, *optional*): Class names in class order.
        backbone (`dict`): Where the backbone came from and how to build it.
        training_plan (`dict`, *optional*): How it was trained, see `AutoLoraTrainer.plan`.
        results (`list[dict]`): What was measured of the deployed route, see [`add_result`].
        auxiliary (`nn.ModuleDict`): Modules of an objective that train along. No route runs them, and they are neither
            saved with the model nor deployed; checkpoints of a training hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AutoLoraConfig,
        *,
        preprocessing: Preprocessing,
        backbone: dict[str, Any],
        stock_layers: frozenset[str] = frozenset(),
        label_names: list[str] | None = None,
        threat_model: ThreatModel | None = None,
    ) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = list(targets.statistics_norms(model))
        branches.check(config, norms, stock_layers)

        # PEFT's own word for an adapter that sits on no layer at all.
        names = targets.exactly(config.target_modules or ()) or DUMMY_TARGET_MODULES
        made = [branches.peft_config(config, stock_layers, target_modules=names) for _ in range(2)]
        if config.mode == "full":
            super().__init__(model, made[0], adapter_name=NATURAL)
        else:
            super().__init__(model, made[0], adapter_name=ROBUST)
            if config.natural_route == "branch":
                self.add_adapter(NATURAL, made[1])
            # As PEFT does for `modules_to_save`, which however matches the ends of names and can catch other layers.
            for name in [*config.heads, *norms, *(config.modules_to_save or [])]:
                wrapper = ModulesToSaveWrapper(model.get_submodule(name), ROBUST)
                wrapper.set_adapter(ROBUST)
                model.set_submodule(name, wrapper)
        self.autolora_config = config
        self.preprocessing = preprocessing
        self.threat_model = threat_model or ThreatModel()
        self.label_names = label_names
        self.backbone = backbone
        self.stock_layers = stock_layers
        self.training_plan: dict[str, Any] | None = None
        self.results: list[dict[str, Any]] = []
        self.num_classes = backbones.num_classes_of(model)
        self.natural_norms = nn.ModuleDict()
        self.auxiliary = nn.ModuleDict()
        self._heads_only = False
        self._held_back: list[nn.Parameter] = []
        branches.finish(self.lora_layers(), config, self.adapters)
        self._restore_trainable(trainable)
        # New modules start in train mode, whatever mode the model is in.
        for layer in self.lora_layers().values():
            cast(nn.Module, layer).train(layer.get_base_layer().training)
        for name in self._saved_modules():
            saved = cast(ModulesToSaveWrapper, model.get_submodule(name))
            saved.train(saved.original_module.training)
        self._switch = self._build_routes(norms)

    def _restore_trainable(self, trainable: list[nn.Parameter]) -> None:
        """PEFT freezes everything but the active adapter; here several parts train at once."""
        self.requires_grad_(False)
        parts = []
        if self.autolora_config.mode == "full":
            parts += trainable
        else:
            for module in self._saved_modules().values():
                parts += module.parameters()
        for adapter in self.adapters:
            parts += self._branch_parameters(adapter)
        for parameter in parts:
            parameter.requires_grad_(True)

    def _build_routes(self, norms: list[str]) -> RouteSwitch:
        config, layers = self.autolora_config, list(self.lora_layers().values())
        routes = {ROBUST: Route(adapters=() if config.mode == "full" else (ROBUST,))}
        if config.natural_route != "none":
            routes[NATURAL] = self._natural_route(routes[ROBUST], norms)
        return RouteSwitch(layers, routes)

    def _natural_route(self, robust: Route, norms: list[str]) -> Route:
        config = self.autolora_config
        has_branch = config.natural_route == "branch"
        natural = Route(adapters=(*robust.adapters, NATURAL) if has_branch else robust.adapters)
        if config.stop_gradient:
            own = {parameter for module in self.heads for parameter in module.parameters()}
            if has_branch:
                own.update(self._branch_parameters(NATURAL))
            natural.blocked += [p for p in self.parameters() if p.requires_grad and p not in own]

        base = self.get_base_model()
        for name in norms:
            parent_name, _, child = name.rpartition(".")
            parent = base.get_submodule(parent_name)
            original = parent.get_submodule(child)
            inner = original.modules_to_save[ROBUST] if isinstance(original, ModulesToSaveWrapper) else original
            if config.norm == "robust_stats":
                natural.untracked.append(inner)
            elif config.norm != "shared":
                replacement = copy.deepcopy(inner)
                if config.norm == "dual":
                    # The natural set's affine parameters never train (as in the released dual BatchNorm).
                    replacement.requires_grad_(False)
                elif config.norm == "frozen":
                    fix_statistics(replacement)
                self.natural_norms[name.replace(".", "/")] = replacement
                natural.swapped.append((parent, child, original, replacement))
        return natural

    @property
    def label_names(self) -> list[str] | None:
        return self._label_names

    @label_names.setter
    def label_names(self, names: list[str] | None) -> None:
        # Checked here, since names that cannot be read back would be noticed when the model is saved.
        for index, name in enumerate(names or ()):
            text(name, f"label_names[{index}]")
        self._label_names = None if names is None else list(names)

    # ---- structure ----

    def lora_layers(self) -> dict[str, BaseTunerLayer]:
        """Layers that carry a branch, of LoRA or another kind, by their name in the base model."""
        return {
            name: module
            for name, module in self.get_base_model().named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    def _branch_parameters(self, adapter: str) -> list[nn.Parameter]:
        """The parameters of one branch, in every layer."""
        layers = self.lora_layers().values()
        return [parameter for layer in layers for parameter in branch_parameters(layer, adapter).values()]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the branches that each of these layers carries."""
        return tuple(self.peft_config) if self.autolora_config.has_branches else ()

    @property
    def routes(self) -> tuple[str, ...]:
        """Names of the routes, the deployed one first."""
        return self._switch.names

    def _saved_modules(self) -> dict[str, nn.Module]:
        """Mode `adapter`: head and BatchNorm layers that the robust adapter carries, by their name in the base."""
        return {
            name: module.modules_to_save[ROBUST]
            for name, module in self.get_base_model().named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        }

    @property
    def heads(self) -> list[nn.Module]:
        """The classification layers, mostly one, that both routes share and train."""
        modules = [self.get_base_model().get_submodule(name) for name in self.autolora_config.heads]
        return [m.modules_to_save[ROBUST] if isinstance(m, ModulesToSaveWrapper) else m for m in modules]

    # ---- training ----

    def limit_training(self, routes: Sequence[str] | None = None, *, heads_only: bool = False) -> None:
        """Lets only what is needed train; called again, it starts from what trained at first.

        Args:
            routes (`Sequence[str]`, *optional*): Parameters that none of these routes uses stay as they are. `None`:
                all routes.
            heads_only (`bool`): Only the classification layers train, and all else is in eval mode in training too:
                running statistics stay, nothing is dropped out.
        """
        for parameter in self._held_back:
            parameter.requires_grad_(True)
        unused: set[nn.Parameter] = set()
        if routes is not None and NATURAL not in routes:
            unused.update(self._natural_parameters())
        if heads_only:
            heads = {parameter for head in self.heads for parameter in head.parameters()}
            unused.update(parameter for parameter in self.parameters() if parameter not in heads)
        self._held_back = [
            parameter for parameter in self.parameters() if parameter.requires_grad and parameter in unused
        ]
        for parameter in self._held_back:
            parameter.requires_grad_(False)
        self._heads_only = heads_only
        self.train(self.training)

    def _natural_parameters(self) -> list[nn.Parameter]:
        """What the natural route alone uses: its branch and its norms."""
        branch = self._branch_parameters(NATURAL) if NATURAL in self.adapters else []
        return [*self.natural_norms.parameters(), *branch]

    def robust_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the deployed route."""
        others = {*self._natural_parameters(), *self.auxiliary.parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in others]

    def train(self, mode: bool = True) -> AutoLoraModel:
        super().train(mode and not self._heads_only)
        self.training = mode
        if self._heads_only:
            for head in self.heads:
                head.train(mode)
        return self

    # ---- forward ----

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the deployed route, or the one of an enclosing [`route`].

        Args:
            pixel_values (`Tensor`): Images normalised as the checkpoint's own preprocessing does, N x 3 x H x W.

        Returns:
            What the base model returns: a tensor of logits for timm, an `ImageClassifierOutput` for transformers.
        """
        # Positional, because timm calls its input `x`.
        with checkpointing.forward_pass(self.get_base_model(), self._switch):
            return super().forward(pixel_values, *args, **kwargs)

    def route(self, name: str) -> AbstractContextManager[None]:
        """Context in which the model runs route `"robust"` or `"natural"`, and only that route's parameters train."""
        return self._switch.use(name)

    @property
    def current_route(self) -> str:
        return self._switch.current

    @contextmanager
    def own_precision(self) -> Iterator[None]:
        """Inside, the autocast is off that accelerate puts around `forward` for training in mixed precision.

        What judges accuracy is the model as it will be deployed.
        """
        wrapped = self.__dict__.pop("forward", None)
        try:
            yield
        finally:
            if wrapped is not None:
                self.__dict__["forward"] = wrapped

    def pixel_space(self, route: str | None = None) -> PixelModel:
        """The model as a function of pixels: float N x 3 x H x W in [0, 1] to logits N x K.

        Shares every weight with this model. This is what an attack library takes.
        """
        return PixelModel(self, route or self.current_route)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model without any branch. In mode `full` that is the robust route."""
        adapters = {
            name: (layer._disable_adapters, layer._active_adapter) for name, layer in self.lora_layers().items()
        }
        saved = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        try:
            for layer in self.lora_layers().values():
                layer._disable_adapters = True
            for module in saved:
                module._disable_adapters = True
            yield
        finally:
            for name, layer in self.lora_layers().items():
                layer._disable_adapters, layer._active_adapter = adapters[name]
            for module in saved:
                module._disable_adapters = False

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        raise RuntimeError(
            f"`set_adapter({adapter_name!r})` would break the two routes of an AutoLoraModel. Use "
            "`with model.route('natural'): ...` or `load_autolora_model(..., route='natural')`."
        )

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> nn.Module:
        """The deployed robust model as a plain module: in mode `full` the backbone itself, without the natural branch;
        in mode `adapter` the backbone with the robust adapter merged. This model is used up.

        Raises:
            ValueError: In mode `adapter`, if branches of this kind cannot be merged.
        """
        # Not PEFT's own, which takes any module with an attribute `base_layer` for one of its layers (timm's DLA).
        if self.autolora_config.mode == "adapter":
            branches.check_mergeable(self.lora_layers(), self.autolora_config, [ROBUST])
        self._switch.rest_in(ROBUST)
        if self.autolora_config.mode == "adapter":
            for layer in self.lora_layers().values():
                layer.merge(safe_merge=safe_merge, adapter_names=[ROBUST])
        return self._unwrap(keep_saved=True)

    def _unwrap(self, keep_saved: bool) -> nn.Module:
        """The base model with its own layers in their places; with the trained copies of head and norms, or not."""
        base, saved = self.get_base_model(), self._saved_modules()
        for name, layer in self.lora_layers().items():
            base.set_submodule(name, layer.get_base_layer())
        for name, module in saved.items():
            base.set_submodule(
                name, module if keep_saved else cast(nn.Module, base.get_submodule(name).original_module)
            )
        del base.peft_config
        forget_cached(base)
        return base

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "Merging in place would break the two routes of an AutoLoraModel. Use `merge_and_unload()` for a plain "
            "robust model."
        )

    # ---- saving ----

    def save_pretrained(  # type: ignore[override]  # PEFT's options that do not apply are not there
        self, save_directory: str | os.PathLike, **kwargs: Any
    ) -> None:
        """Writes everything [`load_autolora_model`] needs to rebuild both routes bit for bit; safetensors only.

        Mode `full`: the robust model as an ordinary timm or transformers checkpoint. Mode `adapter`: the robust
        adapter as a stock PEFT adapter. Both: the natural route as a PEFT adapter in the subfolder `natural`, and
        `autolora_config.json`. Files appear whole or not at all.

        Args:
            save_directory (`str`): Folder to write to; created if needed.
            is_main_process (`bool`): Write nothing when `False`.
        """
        if kwargs.pop("is_main_process", True):
            saving.save(self, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Publishes the model with its card on the Hub, in one commit.

        Args:
            repo_id (`str`): `"org/name"`, created if there is none; without `"org/"` in your own namespace.
            **kwargs: Options of [`push_folder`]: `private`, `token`, `revision`, `commit_message`, `create_pr`.
        """
        # The only import of something above: PEFT users expect the method here.
        from .hub.model_card import write_model_card
        from .hub.push import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_model_card(folder, self, name=repo_id)
            return push_folder(folder, repo_id, **kwargs)

    def add_result(self, report: RobustnessReport) -> None:
        """Remembers a measurement of the deployed route, which [`save_pretrained`] then writes down with the model.

        It belongs to the weights of this moment: once they have changed it is no longer saved. It takes the place of
        one that differs from it in the time it took alone, as a release that repeats the test after training gives.

        Raises:
            ValueError: If the report is about another route.
        """
        if report.route != ROBUST:
            raise ValueError(f"Only results of the deployed route are published, this one is of {report.route!r}.")
        result = {**report.to_dict(), "weights_sha256": saving.deployed_digest(self)}
        found = saving.without_times(result)
        self.results[:] = [other for other in self.results if saving.without_times(other) != found]
        self.results.append(result)

    def load_weights(self, directory: str | os.PathLike) -> None:
        """Loads what [`save_pretrained`] of a model of the same configuration wrote, in place.

        Raises:
            ValueError: If anything is missing, left over or of another shape; nothing is changed then.
        """
        saving.load_weights(self, directory)
