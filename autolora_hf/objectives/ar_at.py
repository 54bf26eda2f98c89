"""AR-AT, asymmetric representation-regularised adversarial training (Waseda, Chang, Echizen, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.pgd import attack_mode
from ..routes import NATURAL, ROBUST
from ..schedules import LossScalars
from ..targets import statistics_norms
from .base import ADVICE, Batch, Objective, ObjectiveOutput, RouteForward
from .features import FeatureReader
from .terms import accuracy


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


PREDICTORS = "ar_at_predictors"


@dataclass
class AsymmetricRegularization(Objective):
    """`w_adv CE(f_adv(x~), y) + w_cl CE(f_clean(x), y) + gamma / L sum_l [1 - cos(p_l(z~_l), sg(z_l))]`.

    Clean images run through norms of their own (here the natural route, `norm="split"`), adversarial ones through the
    deployed route's. `sg` keeps the invariance term's gradient from the clean features `z_l`; a predictor `p_l` maps
    the adversarial ones. The weights are AutoLoRa's automatic scalar with alpha = 1: `w_adv` is the natural route's
    training accuracy of the last epoch, `w_cl = 1 - w_adv`. Published for training from scratch; that it helps in
    fine-tuning is not shown.

    Args:
        gamma (`float`): Weight of the invariance term; 30 for ResNet-18, 100 for WRN-34-10 in the paper.
        layers (`list[str]`, *optional*): Layers whose pooled outputs are the features (the paper's ResNet-18: the four
            BatchNorm layers of the last stage, whose outputs are rectified first). `None`: what the head gets.
    """

    gamma: float = field(default=30.0, metadata={"help": "Weight of the invariance term."})
    layers: list[str] | None = field(default=None, metadata={"help": "Layers whose outputs are the features."})

    description: ClassVar[str] = (
        "[AR-AT](https://arxiv.org/abs/2402.14648) (Waseda, Chang, Echizen, ICLR 2025): adversarial features are "
        "drawn to clean ones, never the other way round, and clean images have norms of their own in training."
    )
    routes: ClassVar[tuple[str, ...]] = (ROBUST, NATURAL)
    config: ClassVar[dict[str, Any]] = {"natural_route": "plain", "norm": "split", "stop_gradient": False}
    uses_scalars = True
    scalars: ClassVar[tuple[str, ...]] = ("lambda1",)
    milestones: ClassVar[tuple[float, ...]] = (3 / 4, 9 / 10)

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"`gamma` must not be negative, got {self.gamma}.")

    def prepare(self, model: AutoLoraModel, seed: int) -> None:
        super().prepare(model, seed)
        config = model.autolora_config
        split = config.norm == "split" or not statistics_norms(model.get_base_model())
        if config.natural_route != "plain" or config.stop_gradient or not split:
            raise ValueError(
                "AR-AT needs `natural_route='plain'`, `stop_gradient=False` and, with BatchNorm, `norm='split'`; this "
                f"model has {config.natural_route!r}, {config.stop_gradient} and {config.norm!r}. " + ADVICE
            )
        reference = next(model.parameters())
        example = torch.zeros(1, 3, *model.preprocessing.image_size, device=reference.device, dtype=reference.dtype)
        with attack_mode(model), torch.no_grad(), FeatureReader(model, self.layers or ()) as reader:
            model(example)
            widths = [feature.shape[1] for feature in reader.features()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictors = nn.ModuleList(predictor(width) for width in widths)
        self._predictors: nn.ModuleList = predictors.to(reference)
        model.auxiliary[PREDICTORS] = self._predictors

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        clean, clean_features = forward.with_features(NATURAL, batch.pixels, self.layers or ())
        robust, robust_features = forward.with_features(ROBUST, batch.adversarial, self.layers or ())
        natural_ce, robust_ce = F.cross_entropy(clean, batch.labels), F.cross_entropy(robust, batch.labels)
        pairs = zip(self._predictors, clean_features, robust_features, strict=True)
        distance = torch.stack([self._distance(*pair) for pair in pairs]).mean()
        # Their running accuracy: `lambda1 = 1 - SA`.
        weight = scalars.lambda1
        loss = (1 - weight) * robust_ce + weight * natural_ce + self.gamma * distance
        terms = {"natural_loss": natural_ce.detach(), "robust_loss": robust_ce.detach()}
        terms["feature_distance"] = distance.detach()
        terms["train_natural_accuracy"] = accuracy(clean, batch.labels)
        terms["train_robust_accuracy"] = accuracy(robust, batch.labels)
        return ObjectiveOutput(loss, terms)

    @staticmethod
    def _distance(head: nn.Module, clean: Tensor, robust: Tensor) -> Tensor:
        # BatchNorm cannot normalise a single image by itself.
        head.train(len(robust) > 1)
        predicted = head(robust.to(next(head.parameters()).dtype))
        return (1 - F.cosine_similarity(predicted, clean.detach(), dim=1)).mean()


def predictor(width: int) -> nn.Sequential:
    """Linear to a quarter without bias, BatchNorm, ReLU, linear back: `width^2 / 2 + 1.5 width` parameters."""
    hidden = max(1, width // 4)
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )
