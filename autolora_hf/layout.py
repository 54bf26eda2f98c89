"""What a saved model's files hold: tensors of the live model under their names on disk, and PEFT configurations.

| file | mode | |
|---|---|---|
| `model.safetensors`, `config.json` | `full` | the robust model, an ordinary timm or transformers checkpoint |
| `adapter_model.safetensors`, `adapter_config.json` | `adapter` | the robust adapter: PEFT LoRA, head, norms |
| the same two in the folder `natural` | both | the natural route as a PEFT adapter |
| `natural.safetensors` | both | instead, where the natural route has no branch but norms of its own |
| `autolora_config.json` | both | everything else, see [`Record`] |

Each adapter is right when it is loaded alone. In mode `adapter` the natural route is the robust branch plus its own,
so its file holds both, as one LoRA of twice the rank, with the same head; in mode `full` it belongs on top of the
robust model. Where PEFT has no exact layer for a branch, `robust.safetensors` and `natural.safetensors` take the place
of the adapters, and hold the bare parameters: for the kinds of branch of this package; and for the natural route in
mode `adapter` of every kind but LoRA, two branches of which are not one of the same kind.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from . import branches, targets
from .layers import (
    LORA_FIELDS,
    WeightLora,
    branch_parameters,
    fold_factors,
    stock_names,
    unfold_factors,
    weight_name,
)
from .routes import NATURAL, ROBUST


if TYPE_CHECKING:
    from .modeling import AutoLoraModel


ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_WEIGHTS, BASE_CONFIG, PROCESSOR_CONFIG = "model.safetensors", "config.json", "preprocessor_config.json"
NATURAL_ADAPTER, NATURAL_CONFIG = f"natural/{ADAPTER_WEIGHTS}", f"natural/{ADAPTER_CONFIG}"
ROBUST_FACTORS, NATURAL_FACTORS = "robust.safetensors", "natural.safetensors"
PEFT_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")


def weight_files(model: AutoLoraModel) -> tuple[str, str | None]:
    """Names of the files with the robust and with the natural weights of this model; `None`: it has none of these."""
    stock = loads_with_stock_peft(model)
    if model.autolora_config.mode == "full":
        robust = BASE_WEIGHTS
    else:
        robust = ADAPTER_WEIGHTS if stock else ROBUST_FACTORS
    if model.autolora_config.natural_route == "branch":
        alone = model.autolora_config.mode == "full" or model.autolora_config.branch == "lora"
        return robust, NATURAL_ADAPTER if stock and alone else NATURAL_FACTORS
    return robust, NATURAL_FACTORS if natural_tensors(model) else None


def loads_with_stock_peft(model: AutoLoraModel) -> bool:
    """Whether PEFT alone has the exact layer for every branch of this model."""
    if model.autolora_config.branch != "lora" and not model.autolora_config.kind.is_pefts:
        return False
    base, saved = model.get_base_model(), [*model._saved_modules(), *_natural_norms(model)]
    stock = all(name in model.stock_layers for name in model.lora_layers())
    # PEFT matches `modules_to_save` by the plain end of the name.
    told_apart = matched_by_suffix(base, list(dict.fromkeys(saved)), separator="") is not None
    # Only a square kernel of the released layout has a counterpart in PEFT's.
    square = all(
        len(set(getattr(layer.get_base_layer(), weight_name(layer.get_base_layer())).shape[2:])) <= 1
        for layer in model.lora_layers().values()
        if isinstance(layer, WeightLora)
    )
    return stock and square and told_apart


def matched_by_suffix(base: nn.Module, names: list[str], separator: str = ".") -> list[str] | None:
    """`names`, if PEFT, which matches the ends of names, takes them for these layers and no others."""
    # A second copy of a layer without weights, such as a norm that is switched off, changes nothing.
    modules = [name for name, module in base.named_modules() if module.state_dict()]
    layers = {re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+)$", "", name) for name in modules}
    ends = tuple(f"{separator}{name}" for name in names)
    return names if {name for name in layers if f"{separator}{name}".endswith(ends)} == set(names) else None


# ---- tensors of the live model ----


def base_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """The base model's state dict under its own names, as if no branch had been added."""
    base = model.get_base_model()
    branched = {f"{name}.": f"{name}.base_layer." for name in model.lora_layers()}
    renames = {inner: outer for outer, inner in branched.items()}
    renames |= {
        f"{name}.original_module.": f"{name}."
        for name, m in base.named_modules()
        if isinstance(m, ModulesToSaveWrapper)
    }
    tensors = {}
    for key, tensor in base.state_dict().items():
        outer = next((prefix for prefix in branched if key.startswith(prefix)), None)
        if ".modules_to_save." in key or (outer is not None and not key.startswith(branched[outer])):
            continue
        wrapper = next((prefix for prefix in renames if key.startswith(prefix)), None)
        tensors[key if wrapper is None else renames[wrapper] + key[len(wrapper) :]] = tensor
    return tensors


def saved_tensors(model: AutoLoraModel, natural: bool = False) -> dict[str, Tensor]:
    """Tensors of the modules that an adapter carries whole: head and norms, in the set of one route."""
    modules = dict(model._saved_modules())
    if natural:
        modules |= _natural_norms(model)
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}


def deployed_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """What training changes in the deployed route: the whole model in mode `full`, else factors, head and norms."""
    if model.autolora_config.mode == "full":
        return base_tensors(model)
    return {**_factors(model, ROBUST), **saved_tensors(model)}


def natural_tensors(model: AutoLoraModel) -> dict[str, Tensor]:
    """Factors of the natural branch, if there is one, and the natural route's own set of norms."""
    norms = _natural_norms(model)
    own = {f"{name}.{key}": tensor for name, module in norms.items() for key, tensor in module.state_dict().items()}
    branch = _factors(model, NATURAL) if model.autolora_config.natural_route == "branch" else {}
    return {**branch, **own}


def _natural_norms(model: AutoLoraModel) -> dict[str, nn.Module]:
    return {name.replace("/", "."): norm for name, norm in model.natural_norms.items()}


def _factors(model: AutoLoraModel, adapter: str) -> dict[str, Tensor]:
    """The parameters of a branch in all layers; those that layers share once, under the name in the first of them."""
    owners: dict[nn.Parameter, str] = {}
    for name, layer in model.lora_layers().items():
        for key, parameter in branch_parameters(layer, adapter).items():
            owners.setdefault(parameter, f"{name}.{key}")
    return {name: parameter.detach() for parameter, name in owners.items()}


# ---- files of stock PEFT ----


def robust_adapter(model: AutoLoraModel) -> tuple[dict[str, Tensor], PeftConfig]:
    """Mode `adapter`: tensors and configuration of the robust adapter, as PEFT writes them."""
    if model.autolora_config.branch != "lora":
        return _single_adapter(model, ROBUST)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.lora_layers().items():
        tensors |= _named(name, *_unfolded(layer, ROBUST))
    tensors |= {f"{PEFT_PREFIX}{key}": tensor for key, tensor in saved_tensors(model).items()}
    config = model.peft_config[ROBUST]
    fields = {key: getattr(config, key) for key in LORA_FIELDS}
    if model.autolora_config.layout == "released":
        # PEFT knows its own factorisation only; the same change of a convolution's weight has rank r k^2 there.
        fields |= _rank_fields(model, tensors)
    return tensors, _stock_config(model, fields, list(model._saved_modules()))


def _single_adapter(model: AutoLoraModel, adapter: str) -> tuple[dict[str, Tensor], PeftConfig]:
    """One branch of another kind than LoRA as an adapter of PEFT's, with head and norms of its route."""
    natural = adapter == NATURAL
    tensors = {PEFT_PREFIX + disk: p.detach() for disk, _, p in _stock_parameters(model, adapter)}
    tensors |= {f"{PEFT_PREFIX}{key}": tensor for key, tensor in saved_tensors(model, natural).items()}
    modules = list(dict.fromkeys([*model._saved_modules(), *(_natural_norms(model) if natural else ())]))
    return tensors, _stock_config(model, {}, modules)


def _stock_parameters(model: AutoLoraModel, adapter: str) -> list[tuple[str, str, nn.Parameter]]:
    """For each parameter of a branch its name in PEFT's file, its name in [`_factors`], and itself."""
    return [
        (f"{name}.{disk}", f"{name}.{key}", branch_parameters(layer, adapter)[key])
        for name, layer in model.lora_layers().items()
        for key, disk in stock_names(layer, adapter).items()
    ]


def natural_adapter(model: AutoLoraModel) -> tuple[dict[str, Tensor], PeftConfig]:
    """Tensors and configuration of the natural route as a PEFT adapter of the base model.

    In mode `adapter` that is the sum of two branches, so their factors are put side by side.
    """
    if model.autolora_config.branch != "lora":
        return _single_adapter(model, NATURAL)
    tensors: dict[str, Tensor] = {}
    adapter = model.autolora_config.mode == "adapter"
    for name, layer in model.lora_layers().items():
        pairs = [_unfolded(layer, branch) for branch in ((ROBUST, NATURAL) if adapter else (NATURAL,))]
        tensors |= _named(name, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
    tensors |= {f"{PEFT_PREFIX}{key}": tensor for key, tensor in saved_tensors(model, natural=True).items()}
    config = model.peft_config[NATURAL]
    fields = {key: getattr(config, key) for key in LORA_FIELDS} | _rank_fields(model, tensors)
    modules = list(dict.fromkeys([*model._saved_modules(), *_natural_norms(model)]))
    return tensors, _stock_config(model, fields, modules)


def robust_factors(model: AutoLoraModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mode `adapter`: what [`deployed_tensors`] gave before [`robust_adapter`] made a file of it."""
    if model.autolora_config.branch != "lora":
        found = {key: tensors[PEFT_PREFIX + disk] for disk, key, _ in _stock_parameters(model, ROBUST)}
        return found | {key: tensors[f"{PEFT_PREFIX}{key}"] for key in saved_tensors(model)}
    found = {}
    for name, layer in model.lora_layers().items():
        found |= _folded(name, layer, *(tensors[key] for key in _keys(name)))
    return found | {key: tensors[f"{PEFT_PREFIX}{key}"] for key in saved_tensors(model)}


def natural_factors(model: AutoLoraModel, tensors: dict[str, Tensor], robust: dict[str, Tensor]) -> dict[str, Tensor]:
    """What [`natural_tensors`] gave before [`natural_adapter`] made a file of it.

    Raises:
        ValueError: In mode `adapter`, if what the file repeats of the robust route is not in `robust`.
    """
    if model.autolora_config.branch != "lora":
        names = {key: PEFT_PREFIX + disk for disk, key, _ in _stock_parameters(model, NATURAL)}
        return {key: tensors[names.get(key, f"{PEFT_PREFIX}{key}")] for key in natural_tensors(model)}
    found: dict[str, Tensor] = {}
    adapter = model.autolora_config.mode == "adapter"
    for name, layer in model.lora_layers().items():
        first, second = (tensors[key] for key in _keys(name))
        if adapter:
            rank = len(first) // 2
            _check_repeated(_folded(name, layer, first[:rank], second[:, :rank]), robust)
            first, second = first[rank:], second[:, rank:]
        found |= _folded(name, layer, first, second)
    own = {key for key in natural_tensors(model) if key not in found}
    repeated = {key for key in saved_tensors(model, natural=True) if key not in own}
    _check_repeated({key: tensors[f"{PEFT_PREFIX}{key}"] for key in repeated}, robust)
    return found | {key: tensors[f"{PEFT_PREFIX}{key}"] for key in own}


def _check_repeated(found: dict[str, Tensor], robust: dict[str, Tensor]) -> None:
    other = sorted(key for key, tensor in found.items() if not torch.equal(tensor, robust[key]))
    if other:
        raise ValueError(
            f"The natural adapter was not saved together with the robust one: {other[0]} differs. Nothing was loaded."
        )


def _keys(name: str) -> list[str]:
    return [f"{PEFT_PREFIX}{name}.{side}.weight" for side in _SIDES]


def _named(name: str, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return dict(zip(_keys(name), (first, second), strict=True))


def _unfolded(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    first, second = (branch_parameters(layer, adapter)[side].detach() for side in _SIDES)
    if isinstance(layer, WeightLora) and not isinstance(layer.get_base_layer(), nn.Linear):
        return unfold_factors(first, second, layer.kernel_width)
    return first, second


def _folded(name: str, layer: LoraLayer, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, WeightLora) and not isinstance(layer.get_base_layer(), nn.Linear):
        found = fold_factors(first, second, layer.kernel_width)
        again = unfold_factors(*found, layer.kernel_width)
        # Values between the blocks would be used by PEFT, and be lost here.
        if not (torch.equal(again[0], first) and torch.equal(again[1], second)):
            raise ValueError(f"The factors of {name} are not of the layout that was saved. Nothing was loaded.")
        first, second = found
    return {f"{name}.lora_A": first, f"{name}.lora_B": second}


def _rank_fields(model: AutoLoraModel, tensors: dict[str, Tensor]) -> dict[str, object]:
    """`LoraConfig` fields for the ranks that the tensors really have, the commonest one being the default."""
    layers = model.lora_layers()
    ranks = {name: tensors[_keys(name)[0]].shape[0] for name in layers}
    default = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {name: next(iter(layer.scaling.values())) * ranks[name] for name, layer in layers.items()}
    alpha = next(alphas[name] for name in layers if ranks[name] == default)
    return {
        "r": default,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != default},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }


def _stock_config(model: AutoLoraModel, fields: dict[str, Any], modules_to_save: list[str]) -> PeftConfig:
    base, layers = model.get_base_model(), list(model.lora_layers())
    # In mode `full` the natural branch belongs on the model beside it, whose name on the Hub is not known here.
    adapter = model.autolora_config.mode == "adapter"
    options: dict[str, Any] = {
        "target_modules": matched_by_suffix(base, layers) or targets.exactly(layers),
        "modules_to_save": modules_to_save or None,
        "inference_mode": True,
        "base_model_name_or_path": model.backbone["name_or_path"] if adapter else None,
        "revision": model.backbone["revision"] if adapter else None,
    }
    if model.autolora_config.branch == "lora":
        config: Any = LoraConfig(**fields, **options)
    else:
        config = branches.peft_config(model.autolora_config, **options)
    if isinstance(config.target_modules, set):
        # PEFT makes a set of a list, whose order would differ from one process to the next, and the file with it.
        config.target_modules = sorted(config.target_modules)
    return config
