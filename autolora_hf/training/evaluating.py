"""The part of [`AutoLoraTrainer`] that measures: on validation data every epoch, and what the loss scalars go by."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from ..attacks import PGD
from ..attacks.pgd import attack_mode, hits, logits_of
from ..data import PixelDataset, stratified_subset
from ..evaluation import Accuracy
from ..modeling import AutoLoraModel
from ..objectives import Objective
from ..objectives.terms import similarity
from ..progress import progress_bar
from ..routes import NATURAL, ROBUST
from .attacking import RouteAttacker
from .diagnosis import SIMILARITY, DiagnosisCallback, prediction_shares
from .distributed import synchronize
from .numerics import StepGuard
from .streams import StreamingTrainer, unaugmented


logger = logging.getLogger(__name__)

# Keys of random starts.
TRAINING, EVALUATION, DIAGNOSIS = 0, 1, 2


class EvaluatingTrainer(StreamingTrainer):
    """Validation, the schedules' decisions after it, and the training accuracy of the natural route."""

    objective: Objective
    _attacker: RouteAttacker
    _guard: StepGuard
    _diagnosis: DiagnosisCallback
    _eval_attack: PGD
    _evaluated = 0
    _plain_loader: DataLoader | None = None

    @property
    def measures_scalars(self) -> bool:
        """Whether the loss scalars are there and not fixed, so that an accuracy has to be measured for them."""
        return self.objective.uses_scalars and self.args.loss_scalars is None

    def shown_scalars(self) -> dict[str, float]:
        """The loss scalars that the objective has, as they are now."""
        scalars = self.lr_scheduler.scalars._asdict()
        return {name: scalars[name] for name in self.objective.scalars}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = 0
        # What is evaluated is what the main process saves.
        synchronize(self.model.buffers())
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(  # type: ignore[override]  # `Trainer` says tensors, and takes dictionaries of them
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, Tensor | None]:
        """Outputs of the natural route, if there is one, of the deployed route on clean and on adversarial images, and
        the loss of each adversarial image."""
        inputs = self._prepare_inputs(inputs)
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        model = cast(AutoLoraModel, self.accelerator.unwrap_model(model, keep_torch_compile=False))
        with model.own_precision():
            # The same random starts in every epoch: differences in robust accuracy then come from the weights.
            key, first = (self.args.seed, EVALUATION), self._evaluated + self.args.process_index * len(labels)
            reference = self.objective.reference(pixels)
            adversarial = self._attacker(self._eval_attack, pixels, labels, *key, first=first, reference=reference)
            self._evaluated += self.args.world_size * len(labels)
            with torch.no_grad():
                images, found = self._images(model, pixels), {}
                if NATURAL in model.routes:
                    with model.route(NATURAL):
                        found["natural"] = logits_of(model(images)).float()
                with model.route(ROBUST):
                    found["clean"] = logits_of(model(images)).float()
                    found["robust"] = logits_of(model(self._images(model, adversarial))).float()
                found["loss"] = self.objective.losses(found["robust"], labels, reference)
                if not self.objective.classifies:
                    found["clean_loss"] = self.objective.losses(found["clean"], labels, reference)
        if prediction_loss_only:
            return found["loss"].mean(), None, None
        # The loss is a metric, since `Trainer` would count repeated samples in it.
        return None, found, labels

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation during training: after it, the controller decides about the next epoch."""
        metrics = super()._evaluate(*args, **kwargs)
        accuracy = self._scalar_accuracy() if self.measures_scalars else None
        key = cast(str, self.args.metric_for_best_model)  # the arguments have chosen one
        metric = metrics[key if key.startswith("eval_") else f"eval_{key}"]
        # The rule looks for growth.
        metric = metric if self.args.greater_is_better else -metric
        halved = self.lr_scheduler.end_epoch(metric, accuracy, metrics.get("eval_natural_accuracy"))
        logs: dict[str, Any] = {"next_learning_rate": self.lr_scheduler.get_last_lr()[0], "reload": int(halved)}
        if self.objective.uses_scalars:
            logs = {**self.shown_scalars(), **logs}
        if accuracy is not None:
            logs = {"train_natural_route_accuracy": accuracy, **logs}
        if self.args.eps_schedule != "constant":
            logs = {"eps_share": self.lr_scheduler.epsilon.share(self.state.epoch), **logs}
        self.log(logs)
        self._diagnosis.after_epoch()
        if self.lr_scheduler.finished:
            logger.info("The learning rate is below %g: training is over.", self.args.min_learning_rate)
            self.control.should_training_stop = True
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = self.state.best_metric
        if self.args.greater_is_better and best is not None and best <= 1 / self.model.num_classes:
            # Up to chance level one epoch is as good as another: take the latest instead of the first.
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def _scalar_accuracy(self) -> float:
        if self.args.scalar_accuracy == "running":
            mean = self._guard.epoch_mean("train_natural_accuracy")
            if mean is not None:
                return self.accelerator.reduce(mean, "mean").clamp(0, 1).item()
        return self.natural_training_accuracy()

    @torch.no_grad()
    def natural_training_accuracy(self) -> float:
        """SA: accuracy of the natural route on clean training images, without augmentation, in eval mode.

        On all of them, or on the `scalar_images` that are drawn for it.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._plain_loader is None:
            # Made once, since accelerate keeps every loader. Not by `get_eval_dataloader`, which returns that of the
            # validation set if its workers are persistent.
            self._plain_loader = self.get_test_dataloader(self._measured_images())
        # Of a model with one route, that one.
        route = NATURAL if NATURAL in model.routes else ROBUST
        right, total = 0, 0
        with attack_mode(model), model.own_precision(), model.route(route):
            bar = progress_bar(
                self._plain_loader,
                title="accuracy of the natural route" if route == NATURAL else "accuracy on clean images",
                unit="batch",
                is_shown=not self.args.disable_tqdm,
            )
            for inputs in bar:
                inputs = self._prepare_inputs(inputs)
                logits = logits_of(model(self._images(model, inputs["pixel_values"])))
                found = self.accelerator.gather_for_metrics(hits(logits, inputs["labels"]))
                right, total = right + found.sum().item(), total + len(found)
        return right / total

    def _images(self, model: AutoLoraModel, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _measured_images(self) -> Any:
        data, most = self.train_dataset, self.args.scalar_images
        if most is None or len(data) <= most:
            return unaugmented(data)
        if not isinstance(data, PixelDataset):
            return unaugmented(data).bounded(most)
        return data.select(stratified_subset(data.labels, most, self.args.seed), augmentation="none")


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Validation metrics of classifiers."""
    labels, found = prediction.label_ids, cast(dict[str, np.ndarray], prediction.predictions)
    clean, robust = hits(found["clean"], labels), hits(found["robust"], labels)
    natural = {"natural_route_accuracy": hits(found["natural"], labels).mean()} if "natural" in found else {}
    interval = Accuracy.from_counts(int(robust.sum()), len(robust))
    return {
        "natural_accuracy": clean.mean(),
        "robust_accuracy": robust.mean(),
        "robust_accuracy_low": interval.low,
        "robust_accuracy_high": interval.high,
        **natural,
        **prediction_shares(found["clean"], clean, robust),
        "loss": float(np.mean(found["loss"])),
    }


def losses(prediction: EvalPrediction) -> dict[str, float]:
    """Validation metrics of what does not classify: the objective's own loss, under attack and without one, and how
    similar the embeddings of different images are."""
    found = cast(dict[str, np.ndarray], prediction.predictions)
    means = {name: float(np.mean(found[name])) for name in ("loss", "clean_loss")}
    return means | {SIMILARITY: similarity(torch.from_numpy(found["clean"])).item()}
