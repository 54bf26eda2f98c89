from typing import Any

from torch import nn

from ..backbones import load_backbone
from ..config import AutoLoraConfig
from ..targets import statistics_norms
from .ar_at import AsymmetricRegularization
from .autolora import AutoLora
from .base import Batch, Objective, ObjectiveOutput
from .fare import Fare, SimClip
from .mart import Mart
from .natural import NaturalFineTuning, StandardLinearFineTuning
from .pgd_at import AdversarialLinearFineTuning, AdversarialTraining
from .trades import Trades
from .twins import TwinsAT, TwinsTrades


OBJECTIVES: dict[str, type[Objective]] = {
    "autolora": AutoLora,
    "natural": NaturalFineTuning,
    "slf": StandardLinearFineTuning,
    "pgd-at": AdversarialTraining,
    "alf": AdversarialLinearFineTuning,
    "trades": Trades,
    "mart": Mart,
    "twins-at": TwinsAT,
    "twins-trades": TwinsTrades,
    "ar-at": AsymmetricRegularization,
    "fare": Fare,
    "sim-clip": SimClip,
}


def config_for(objective: str, backbone: nn.Module | str | None = None, **changes: Any) -> AutoLoraConfig:
    """The configuration of a model that is to be trained with `objective`: which routes, norms and gradients it has.

    Args:
        objective (`str`): A name in `OBJECTIVES`.
        backbone (`nn.Module` or `str`, *optional*): What [`get_autolora_model`] will get. If it has no norms with
            running statistics, an objective for which two sets of them are only a part (AR-AT) does without.
        **changes: Further fields of [`AutoLoraConfig`], which also replace those of the objective.

    Raises:
        ValueError: If there is no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
    fields = {**OBJECTIVES[objective].config, **changes}
    if backbone is not None and fields.get("norm") == "split" and "norm" not in changes:
        network = load_backbone(backbone, pretrained=False) if isinstance(backbone, str) else backbone
        if not statistics_norms(network):
            fields["norm"] = "shared"
    return AutoLoraConfig(**fields)


__all__ = [
    "OBJECTIVES",
    "AdversarialLinearFineTuning",
    "AdversarialTraining",
    "AsymmetricRegularization",
    "AutoLora",
    "Batch",
    "Fare",
    "Mart",
    "NaturalFineTuning",
    "Objective",
    "ObjectiveOutput",
    "SimClip",
    "StandardLinearFineTuning",
    "Trades",
    "TwinsAT",
    "TwinsTrades",
    "config_for",
]
