"""What the branch layers of this package have in common, and how any branch layer is looked at."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def weight_name(layer: nn.Module) -> str:
    """Name of the parameter of `layer` that a branch changes."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def branch_parameters(layer: BaseTunerLayer, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter of a branch layer, PEFT's or ours, by their name without that of the adapter.

    A part that is a module with nothing but a weight, such as PEFT's `lora_A`, has the name of the part alone, as if
    it were the bare parameter that [`WeightLora`] holds.
    """
    found: dict[str, nn.Parameter] = {}
    for name in layer.adapter_layer_names:
        parts = getattr(layer, name, None)
        if parts is None or adapter not in parts:
            continue
        part = parts[adapter]
        if isinstance(part, nn.Parameter):
            found[name] = part
            continue
        parameters = dict(part.named_parameters())
        single = list(parameters) == ["weight"]
        found |= {name if single else f"{name}.{key}": parameter for key, parameter in parameters.items()}
    return found


def stock_names(layer: BaseTunerLayer, adapter: str) -> dict[str, str]:
    """What PEFT calls the parameters of [`branch_parameters`] in its files, by their name there."""
    found = {}
    for name in branch_parameters(layer, adapter):
        whole = name in layer.adapter_layer_names and isinstance(getattr(layer, name)[adapter], nn.Module)
        # PEFT writes the magnitudes of DoRA as if they were no module.
        found[name] = f"{name}.weight" if whole and name != "lora_magnitude_vector" else name
    return found


class BranchLayer(nn.Module, LoraLayer):
    """Wraps a layer; adapters change what it computes. Attributes of the layer can be read through the wrapper.

    A `LoraLayer`, so that PEFT's `LoraModel` puts it in place and adds a second adapter to it; which parts an adapter
    has is told by `adapter_layer_names`, each a container of this module with an entry for every adapter.
    """

    # Bare parameters instead of PEFT's inner layers: the factors are matrices, whatever the layer is.
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B")
    # Parts that are modules.
    module_names: tuple[str, ...] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.parameter_name = weight_name(base_layer)
        LoraLayer.__init__(self, base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({}) if name in self.module_names else nn.ParameterDict({}))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        weight = getattr(module, self.parameter_name)
        return weight.shape[1] * getattr(module, "groups", 1), weight.shape[0]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds the parts of an adapter, which then changes nothing yet."""
        raise NotImplementedError

    def _scale(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig) -> None:
        """Writes down rank and scale, `lora_alpha / r`, of an adapter.

        Raises:
            ValueError: If the rank is not positive.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = False

    def _live_adapters(self) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        first = getattr(self, self.adapter_layer_names[0])
        return [name for name in self.active_adapters if name in first]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Without this test a half-built or unpickled wrapper would look for its base layer for ever.
            if name in ("base_layer", "parameter_name") or "parameter_name" not in self.__dict__:
                raise
        return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "autolora." + super().__repr__()
