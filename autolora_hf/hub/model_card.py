"""Model cards: data first, template last. Every figure in a card comes from a report or a training log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ..evaluation import RobustnessReport
from ..files import write_atomically
from ..layout import base_tensors, deployed_tensors, loads_with_stock_peft
from ..modeling import AutoLoraModel


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CARD = "README.md"


def write_model_card(
    folder: str | os.PathLike,
    model: AutoLoraModel,
    reports: Mapping[str, RobustnessReport],
    *,
    plan: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    training_note: str | None = None,
    command: str | None = None,
    figures: Mapping[str, str] | None = None,
    license: str | None = None,
) -> Path:
    """Writes `README.md` into `folder`: Hub metadata, what was measured and on how many images, and how to load it.

    Args:
        folder (`str`): Where [`AutoLoraModel.save_pretrained`] wrote the model.
        model (`AutoLoraModel`): The model the card is about.
        reports (`Mapping[str, RobustnessReport]`): Measurements by row title. The first one is this model's; others
            are shown for comparison. May be empty: the card then says that nothing was measured.
        plan (`Mapping`, *optional*): `AutoLoraTrainer.plan`.
        dataset (`str`, *optional*): What it was trained and measured on.
        training_note (`str`, *optional*): A sentence about the training that the plan does not hold.
        command (`str`, *optional*): Command that repeats training and measurement.
        figures (`Mapping[str, str]`, *optional*): Picture files in `folder`, by caption.
        license (`str`, *optional*): Hub licence identifier. `None`: left open, since it depends on backbone and data.
    """
    folder = Path(folder)
    config = model.autolora_config
    own = next(iter(reports.values()), None)
    named = model.backbone["name_or_path"] or model.backbone["architecture"]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" for ".join(filter(None, [f"Robust {named}", dataset])),
        config=config,
        backbone=model.backbone,
        preprocessing=model.preprocessing,
        label_names=model.label_names,
        num_classes=model.num_classes,
        threat_model=model.threat_model,
        parameters=_backbone_parameters(model),
        adapter_parameters=_adapter_parameters(model),
        stock_peft=_is_stock_adapter(model),
        own=own,
        reports=dict(reports),
        plan=dict(plan or {}),
        dataset=dataset,
        training_note=training_note,
        command=command,
        figures=dict(figures or {}),
        folder_name=folder.resolve().name,
        percent=lambda share: f"{100 * share:.1f}",
    )
    card = f"---\n{_metadata(model, own, dataset, license, folder.resolve().name).to_yaml()}\n---\n\n{body.strip()}\n"
    ModelCard(card)  # raises if the metadata block is not valid
    write_atomically(folder / CARD, card.encode())
    return folder / CARD


def _backbone_parameters(model: AutoLoraModel) -> int:
    """Parameters of the backbone with its head, without branches and without the statistics of norms."""
    parameters = {parameter.data_ptr() for parameter in model.get_base_model().parameters()}
    return sum(tensor.numel() for tensor in base_tensors(model).values() if tensor.data_ptr() in parameters)


def _adapter_parameters(model: AutoLoraModel) -> int:
    """Parameters of the published adapter: the robust branch, the head and the BatchNorm layers."""
    if model.autolora_config.mode == "full":
        return 0
    return sum(tensor.numel() for tensor in deployed_tensors(model).values())


def _is_stock_adapter(model: AutoLoraModel) -> bool:
    return model.autolora_config.mode == "adapter" and loads_with_stock_peft(model)


def _metadata(
    model: AutoLoraModel, report: RobustnessReport | None, dataset: str | None, license: str | None, name: str
) -> ModelCardData:
    source = model.backbone["name_or_path"] or ""
    on_hub = source.count("/") == 1 and not os.path.exists(source)
    results = []
    if report is not None:
        description = {"task_type": "image-classification", "dataset_type": "image-folder"}
        description["dataset_name"] = dataset or "unnamed"
        settings = {
            "norm": report.threat_model.norm,
            "eps": report.threat_model.eps,
            "attack": report.attack,
            "n_examples": len(report.sample_indices),
            "seed": report.seed,
        }
        results = [
            EvalResult(
                **description,
                metric_type="accuracy",
                metric_name="Natural accuracy",
                metric_value=report.natural_accuracy,
                metric_args={"n_examples": len(report.sample_indices)},
            ),
            EvalResult(
                **description,
                metric_type="accuracy",
                metric_name=f"Robust accuracy ({report.threat_model}, {report.attack})",
                metric_value=report.robust_accuracy,
                metric_args=settings,
            ),
        ]
    if model.autolora_config.mode == "full":
        library = model.backbone["library"]
    else:
        library = "peft" if loads_with_stock_peft(model) else "autolora_hf"
    return ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        license=license,
        base_model=source.removeprefix("hf-hub:") if on_hub else None,
        tags=["adversarial-robustness", "autolora", "lora", model.backbone["library"], "safetensors"],
        model_name=name if results else None,
        eval_results=results or None,
    )
