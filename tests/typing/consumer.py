"""Code as users write it. A type checker must find nothing in it; `tests/test_typing.py` asks one.

`assert_type` holds only if the checker sees exactly that type: a result that became `Any` is an error.
"""

from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, assert_type

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

import autolora_hf
from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraModel,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    RobustnessReport,
    ThreatModel,
    TransferAttack,
    config_for,
    evaluate_robustness,
    export_onnx,
    extract_adapter,
    extract_for_accuracy,
    get_autolora_model,
    load_autolora_model,
    verify_release,
)
from autolora_hf.evaluation import Accuracy, AttackResult
from autolora_hf.hub.export import OnnxExport
from autolora_hf.hub.extraction import Extraction
from autolora_hf.hub.push import push_folder
from autolora_hf.hub.verification import Verification
from autolora_hf.objectives import OBJECTIVES, Batch, Objective, ObjectiveOutput
from autolora_hf.objectives.base import RouteForward
from autolora_hf.routes import ROBUST
from autolora_hf.schedules import LossScalars


def make() -> AutoLoraModel:
    backbone: nn.Module = timm.create_model("resnet18", num_classes=10)
    config = AutoLoraConfig(mode="adapter", r=4, branch="lora", target_modules=["layer4.1.conv2"])
    model = get_autolora_model(
        backbone,
        config,
        preprocessing=Preprocessing((32, 32), mean=(0.5, 0.5, 0.5)),
        label_names=["a", "b"],
        threat_model=ThreatModel("l2", 0.5),
    )
    assert_type(model, AutoLoraModel)
    assert_type(config_for("trades", "resnet18", r=2), AutoLoraConfig)
    assert_type(get_autolora_model("resnet18", num_classes=10, image_size=(64, 32)), AutoLoraModel)
    # The lazy names of the package are the ones of its modules.
    assert_type(autolora_hf.get_autolora_model(backbone), autolora_hf.AutoLoraModel)
    assert_type(autolora_hf.__version__, str)
    return model


def run(model: AutoLoraModel, pixels: Tensor, labels: Tensor) -> Tensor:
    attack = PGD(model.threat_model, steps=20, step_size=1 / 255, loss="kl", restarts=2)
    adversarial = attack(model.pixel_space(), pixels, labels, generator=torch.Generator())
    assert_type(adversarial, Tensor)
    assert_type(model.pixel_space()(adversarial), Tensor)
    assert_type(model.route("natural"), AbstractContextManager[None])
    assert_type(model.routes, tuple[str, ...])
    assert_type(model.label_names, list[str] | None)
    assert_type(model.eval().train(), AutoLoraModel)
    assert_type(model.merge_and_unload(), nn.Module)
    with model.route("natural"):
        model(pixels)
    return adversarial


class Silent(TrainerCallback):
    pass


def train(model: AutoLoraModel, data: Any) -> None:
    args = AutoLoraTrainingArguments(
        "out", objective="trades", objective_kwargs={"beta": 6}, eps=4 / 255, attack_step_size=1 / 255, bf16=True
    )
    assert_type(args.eps, float)
    assert_type(args.threat_model, ThreatModel)
    assert_type(args.output_dir, str)
    assert_type(args.new_objective(), Objective)
    trainer = AutoLoraTrainer(model, args, train_dataset=data, callbacks=[Silent()])
    assert_type(trainer.train(resume_from_checkpoint=True), TrainOutput)
    assert_type(trainer.model, AutoLoraModel)
    assert_type(trainer.args, AutoLoraTrainingArguments)
    assert_type(trainer.plan, dict[str, Any])
    assert_type(trainer.evaluate_robustness(data, max_samples=100), RobustnessReport)
    trainer.save_model()
    trainer.push_to_hub(private=True)
    stock: Trainer = trainer
    stock.add_callback(Silent)
    AutoLoraTrainer("resnet18", train_dataset=data).train()


def evaluate(model: nn.Module, other: AutoLoraModel, data: Any) -> None:
    report = evaluate_robustness(model, data, ThreatModel("linf", 8 / 255), max_samples=1000, seed=1)
    assert_type(report, RobustnessReport)
    assert_type(report.natural, Accuracy)
    assert_type(report.robust.value, float)
    assert_type(report.robust.low, float)
    assert_type(report.attacks, list[AttackResult])
    assert_type(report.publishable, bool)
    assert_type(report.to_dict(), dict[str, Any])
    assert_type(RobustnessReport.load("report.json"), RobustnessReport)
    assert_type(RobustnessReport.merged([report, report]), RobustnessReport)
    report.save_html(Path("report.html"))

    def mine(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return pixels

    transfer = TransferAttack(other, PGD(ThreatModel()))
    evaluate_robustness(other, data, attack=["pgd-bf16", "autoattack"], curve=[2 / 255, 4 / 255], corruptions=True)
    evaluate_robustness(other, data, attack=mine, sample_indices=range(10))
    evaluate_robustness(other, data, attack=[PGD(), mine, transfer], checkpoint_dir=Path("verdicts"))


def publish(model: AutoLoraModel, data: Any, *, wait: bool) -> None:
    model.save_pretrained(Path("out"))
    assert_type(model.push_to_hub("org/name", private=True), CommitInfo)
    assert_type(push_folder("out", "org/name"), CommitInfo)
    assert_type(push_folder("out", "org/name", run_as_future=not wait), CommitInfo | Future[CommitInfo])
    loaded = load_autolora_model("org/name", revision="main", token=None, cache_dir=Path("cache"))
    assert_type(loaded, AutoLoraModel)
    assert_type(load_autolora_model(Path("out"), base_model=timm.create_model("resnet18")), AutoLoraModel)
    assert_type(export_onnx(loaded, "model.onnx"), OnnxExport)
    assert_type(extract_adapter(loaded, size=0.1), Extraction)
    assert_type(extract_for_accuracy(loaded, None, data, keep=0.9), Extraction)
    verification = verify_release("org/name", data)
    assert_type(verification, Verification)
    assert_type(verification.holds, bool)


@dataclass
class Mixed(Objective):
    """An objective of one's own: options are fields, everything else is a class attribute."""

    weight: float = field(default=0.5, metadata={"help": "Weight of the adversarial images."})

    description: ClassVar[str] = "a mixture"
    attack_loss = "kl"

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        clean, robust = forward(ROBUST, batch.pixels), forward(ROBUST, batch.adversarial)
        assert_type(clean, Tensor)
        loss = (1 - self.weight) * F.cross_entropy(clean, batch.labels)
        return ObjectiveOutput(loss + self.weight * F.cross_entropy(robust, batch.labels), {"loss": loss.detach()})


OBJECTIVES["mixed"] = Mixed
