"""Model cards: data first, template last. Every figure in a card comes from a report or a training log."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from .. import architectures, branches
from ..config import AutoLoraConfig
from ..download import is_repository_name
from ..evaluation import Accuracy, RobustnessReport
from ..files import write_atomically
from ..layout import base_tensors, deployed_tensors, loads_with_stock_peft
from ..modeling import AutoLoraModel
from ..objectives import OBJECTIVES, Objective
from ..routes import ROBUST
from ..saving import current_results
from ..towers import tower_of


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CARD = "README.md"
# Of a training and of the repair of an adapter: what the table of the plan has no place for.
_NOT_CELLS = ("environment", "repair_environment", "warnings", "repair_warnings")
# Options that take a token: the shortest beginning that no other option has, and the whole.
_TOKENS = (("--to", "--token"), ("--hub-t", "--hub-token"))


def write_model_card(
    folder: str | os.PathLike,
    model: AutoLoraModel,
    *,
    name: str | None = None,
    dataset: str | None = None,
    comparisons: Mapping[str, RobustnessReport] | None = None,
    training_note: str | None = None,
    command: str | None = None,
    figures: Mapping[str, str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    separate: bool = False,
    datasets: list[str] | None = None,
) -> Path:
    """Writes `README.md` into `folder`: Hub metadata, what was measured and on how many images, and how to load it.

    What was measured comes from [`AutoLoraModel.results`], how it was trained from `AutoLoraModel.training_plan`. The
    metadata state robust accuracy only if it was measured with AutoAttack.

    Args:
        folder (`str`): Where [`AutoLoraModel.save_pretrained`] wrote the model.
        model (`AutoLoraModel`): The model the card is about.
        name (`str`, *optional*): What to load it by: `"org/name"` once it is on the Hub. `None`: the folder's name.
        dataset (`str`, *optional*): What to call the data. `None`: the recorded name of the first result's data.
        comparisons (`Mapping[str, RobustnessReport]`, *optional*): Measurements of other models, by row title.
        training_note (`str`, *optional*): A sentence about the training that the plan does not hold.
        command (`str`, *optional*): Command that repeats training and measurement.
        figures (`Mapping[str, str]`, *optional*): Picture files in `folder`, by caption.
        license (`str`, *optional*): Hub licence identifier. `None`: left open, since it depends on backbone and data.
        tags (`list[str]`, *optional*): Further tags.
        separate (`bool`): Whether it was checked that the measured images took no part in training or in the choice of
            the weights. The card says so, or that it was not checked.
        datasets (`list[str]`, *optional*): Datasets on the Hub, besides those that model and results name.
    """
    folder = Path(folder)
    results = reports_of(model)
    dataset = dataset or next((report.dataset.get("name") for report in results), None)
    name = name or folder.resolve().name
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["inline"] = inline
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        dataset=dataset,
        named=_source(model) or model.backbone["architecture"],
        config=model.autolora_config,
        trained_with=_trained_with(model),
        fine_tuned=_fine_tuned(model),
        own_architecture=model.backbone["architecture"] in architectures.NAMES,
        backbone=model.backbone,
        base_code=_base_code(model),
        is_tower=tower_of(model) is not None,
        transformers_class=_transformers_class(model),
        preprocessing=model.preprocessing,
        label_names=model.label_names,
        num_classes=model.num_classes,
        threat_model=model.threat_model,
        parameters=_backbone_parameters(model),
        adapter_parameters=_adapter_parameters(model),
        stock_peft=loads_with_stock_peft(model),
        branch=model.autolora_config.kind.title,
        of_peft=model.autolora_config.branch == "lora" or model.autolora_config.kind.is_pefts,
        rank=_rank(model.autolora_config),
        plain=model.backbone["config"] is not None and _merges(model),
        rows=[*rows_of_results(results), *(measurement_row(*item) for item in (comparisons or {}).items())],
        own=results,
        publishable=any(report.publishable for report in results),
        plan=model.training_plan or {},
        not_cells=_NOT_CELLS,
        training_warnings=_training_warnings(model.training_plan or {}),
        training_note=training_note,
        command=None if command is None else public_command(command),
        separate=separate,
        extraction=(model.training_plan or {}).get("extraction"),
        figures=dict(figures or {}),
        name=name,
        on_hub=is_repository_name(name),
        percent=lambda share: f"{100 * share:.1f}",
    )
    data = _metadata(model, results, dataset, license, name.rpartition("/")[2], tags or [], datasets or [])
    body = re.sub(r"\n{3,}", "\n\n", body.strip())
    card = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    ModelCard(card)  # raises if the metadata block is not valid
    write_atomically(folder / CARD, card.encode())
    return folder / CARD


def rename_card(folder: Path, repo_id: str) -> None:
    """Makes the snippets of a card load the model by its name on the Hub, where they load it by a folder's name."""
    card = folder / CARD
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    known = re.search(r'load_autolora_model\("([^"\n]+)"', text)
    if known is None or known[1] == repo_id:
        return
    old, short = re.escape(known[1]), repo_id.rpartition("/")[2]
    text = re.sub(rf'"local-dir:{old}"', f'"hf-hub:{repo_id}"', text)
    text = re.sub(rf'"{old}"', f'"{repo_id}"', text)
    text = re.sub(rf"^(autolora \w+) {old}\b", rf"\1 {repo_id}", text, flags=re.MULTILINE)
    text = re.sub(rf"^(model-index:\n- name: ){old}$", rf"\g<1>{short}", text, flags=re.MULTILINE)
    write_atomically(card, text.encode())


def reports_of(model: AutoLoraModel) -> list[RobustnessReport]:
    """What was measured with the weights that the model has now, publishable ones first."""
    contents = [
        {key: value for key, value in result.items() if key != "weights_sha256"} for result in current_results(model)
    ]
    reports = [RobustnessReport.from_dict(content) for content in contents]
    return sorted(reports, key=lambda report: not report.publishable)


def public_command(command: str) -> str:
    """A command line as others may read it: no token, and of absolute paths of this machine the last part alone."""
    words, is_secret = [], False
    for word in shlex.split(command):
        option, equals, value = word.partition("=")
        if is_secret or _names_a_token(option):
            # The value is the next word, if it is not part of this one.
            is_secret = not is_secret and not equals
            continue
        if option.startswith("--") and os.path.isabs(value):
            word = f"{option}={Path(value).name}"
        words.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(words)


def _names_a_token(option: str) -> bool:
    """Whether it is an option that takes a token, or the beginning of one, which argparse understands too."""
    name = option.replace("_", "-")
    return any(name.startswith(least) and whole.startswith(name) for least, whole in _TOKENS)


def rows_of_results(results: Sequence[RobustnessReport]) -> list[str]:
    """The rows about this model in the table of measurements, publishable ones first."""
    ordered = sorted(results, key=lambda report: not report.publishable)
    return [
        measurement_row(f"this model, measurement {number}" if number > 1 else "this model", report)
        for number, report in enumerate(ordered, start=1)
    ]


def measurement_row(title: str, report: RobustnessReport) -> str:
    """A row of the table of measurements: title, natural and robust accuracy in per cent, and under what."""

    def percent(accuracy: Accuracy) -> str:
        return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"

    attack = f"{inline(report.attack.split(':')[0])}, {report.threat_model}, {report.robust.total:,} images"
    return f"| {inline(title)} | {percent(report.natural)} | {percent(report.robust)} | {attack} |"


def inline(text: Any) -> str:
    """`text` as plain words inside a line of Markdown: a name may come from a stranger's data."""
    words = "".join(char if char.isprintable() else " " for char in str(text))
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(words.split()))


def _training_warnings(plan: Mapping[str, Any]) -> list[str]:
    """What a training plan says went wrong, with the epoch; a stranger's may hold anything under that name."""
    shown = []
    for key in ("warnings", "repair_warnings"):
        entries = plan.get(key)
        for entry in entries if isinstance(entries, list) else ():
            message, epoch = (entry.get("message"), entry.get("epoch")) if isinstance(entry, Mapping) else (None, None)
            if isinstance(message, str):
                shown.append(f"Epoch {epoch:g}: {message}" if isinstance(epoch, (int, float)) else message)
    return shown


def _source(model: AutoLoraModel) -> str | None:
    """Name of the backbone: the recorded one, but never a path of the machine it was trained on."""
    name = model.backbone["name_or_path"]
    if name and (os.path.isabs(name) or name.startswith((".", "~", "local-dir:")) or os.path.isdir(name)):
        return Path(name.removeprefix("local-dir:")).name
    return name


def _hub_name(model: AutoLoraModel) -> str | None:
    """Repository of the backbone on the Hub, if it has one."""
    name = model.backbone["name_or_path"] or ""
    if timm.is_model(name):
        return timm.get_pretrained_cfg_value(name, "hf_hub_id")
    return name if is_repository_name(name) and not os.path.exists(name) else None


def _base_code(model: AutoLoraModel) -> str:
    """Python lines that make `backbone`, the model that the adapter belongs on, without this package."""
    name, classes = model.backbone["name_or_path"], model.num_classes
    if name == "quickstart":
        return textwrap.dedent(
            f"""\
            from importlib.resources import files

            import timm

            folder = files("autolora_hf") / "assets/quickstart"  # the backbone's files; any copy of them will do
            backbone = timm.create_model(f"local-dir:{{folder}}", pretrained=True, num_classes={classes})"""
        )
    if name is None:
        return "backbone = ...  # the model it was trained on"
    shown, revision = _source(model), model.backbone["revision"]
    if model.backbone["library"] == "timm":
        if not timm.is_model(name):
            prefix, suffix = ("hf-hub", f"@{revision}" if revision else "") if shown == name else ("local-dir", "")
            shown = f"{prefix}:{shown}{suffix}"
        size = ((model.backbone["config"] or {}).get("model_args") or {}).get("img_size")
        built = f", img_size={tuple(size)}" if size and model.backbone.get("image_size") else ""
        return f'import timm\n\nbackbone = timm.create_model("{shown}", pretrained=True, num_classes={classes}{built})'
    pinned = f', revision="{revision}"' if revision else ""
    size = getattr(model.get_base_model().config, "image_size", None)
    built = f", image_size={size}" if size and model.backbone.get("image_size") else ""
    kind = _transformers_class(model)
    if tower_of(model) is not None:
        return f'from transformers import {kind}\n\nbackbone = {kind}.from_pretrained("{shown}"{pinned}{built})'
    return textwrap.dedent(
        f"""\
        from transformers import {kind}

        backbone = {kind}.from_pretrained(
            "{shown}"{pinned}, num_labels={classes}{built}, ignore_mismatched_sizes=True
        )"""
    )


def _transformers_class(model: AutoLoraModel) -> str:
    """Name of the class of transformers that loads a checkpoint of such a model."""
    tower = tower_of(model)
    return "AutoModelForImageClassification" if tower is None else tower.name


def _objective(model: AutoLoraModel) -> type[Objective] | None:
    """The objective that a training plan names; a stranger's may name any, or none."""
    name = (model.training_plan or {}).get("objective")
    return OBJECTIVES.get(name) if isinstance(name, str) else None


def _fine_tuned(model: AutoLoraModel) -> str:
    """How much of a model of mode `full` was trained, and what for."""
    objective = _objective(model)
    how = "whose classification layer was trained" if objective and objective.heads_only else "fine-tuned in full"
    robust = objective is None or objective.needs_adversarial
    return how + (" to withstand small worst-case changes of its input" if robust else " on clean images")


def _trained_with(model: AutoLoraModel) -> str:
    """What the objective of the training says about itself."""
    objective = _objective(model)
    return "" if objective is None else objective.description.replace("{branch}", model.autolora_config.kind.title)


def _rank(config: AutoLoraConfig) -> str:
    """What was set of the branches, as text."""
    names = {"r": "r", "lora_alpha": "alpha"}
    values = {name: getattr(config, field) for field, name in names.items() if field in config.kind.fields}
    shown = [f"{name} = {value}" for name, value in {**values, **(config.branch_args or {})}.items()]
    return " and ".join(shown) or "PEFT's defaults"


def _merges(model: AutoLoraModel) -> bool:
    """Whether a plain checkpoint can be made of the deployed route."""
    return model.autolora_config.mode == "full" or branches.mergeable(model.lora_layers(), [ROBUST])


def _backbone_parameters(model: AutoLoraModel) -> int:
    """Parameters of the backbone with its head, without branches and without the statistics of norms."""
    parameters = {parameter.data_ptr() for parameter in model.get_base_model().parameters()}
    return sum(tensor.numel() for tensor in base_tensors(model).values() if tensor.data_ptr() in parameters)


def _adapter_parameters(model: AutoLoraModel) -> int:
    """Values of the published adapter: the robust branch, the head and the norms."""
    if model.autolora_config.mode == "full":
        return 0
    return sum(tensor.numel() for tensor in deployed_tensors(model).values())


def _metadata(
    model: AutoLoraModel,
    results: list[RobustnessReport],
    dataset: str | None,
    license: str | None,
    name: str,
    tags: list[str],
    datasets: list[str],
) -> ModelCardData:
    if model.autolora_config.mode == "full":
        library, relation = model.backbone["library"], "finetune"
    else:
        library, relation = "peft" if loads_with_stock_peft(model) else "autolora_hf", "adapter"
    base = _hub_name(model)
    extra: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if base else {}
    sources = [report.dataset for report in results] + [(model.training_plan or {}).get("training_data")]
    # A stranger's plan may hold anything.
    named = [source for source in sources if isinstance(source, Mapping) and isinstance(source.get("name"), str)]
    on_hub = [source["name"] for source in named if source.get("kind") == "hub"] + datasets
    if on_hub:
        extra["datasets"] = list(dict.fromkeys(on_hub))
    metrics = [metric for report in results for metric in _metrics(report, dataset)]
    if metrics:
        extra |= {"model_name": name, "eval_results": metrics, "metrics": ["accuracy"]}
    branch = [model.autolora_config.branch] if model.autolora_config.has_branches else []
    known = ["adversarial-robustness", "autolora", *branch, model.backbone["library"], "safetensors"]
    return ModelCardData(
        library_name=library,
        pipeline_tag="image-classification" if tower_of(model) is None else "image-feature-extraction",
        license=license,
        tags=list(dict.fromkeys([*known, *tags])),
        **extra,
    )


def _metrics(report: RobustnessReport, dataset: str | None) -> list[EvalResult]:
    """Natural accuracy and, if it is one to publish, robust accuracy, each with its interval."""
    on_hub = report.dataset.get("kind") == "hub"
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": report.dataset["name"] if on_hub else "image-folder",
        "dataset_name": dataset or "unnamed",
        "dataset_config": report.dataset.get("config"),
        "dataset_split": report.dataset.get("split"),
        "dataset_revision": report.dataset.get("revision"),
        "metric_type": "accuracy",
    }
    size: dict[str, Any] = {"n_examples": report.natural.total}
    threat = {
        "norm": report.threat_model.norm,
        "eps": report.threat_model.eps,
        "attack": report.attack,
        "seed": report.seed,
    }
    metrics = [(f"Natural accuracy ({report.natural.total:,} images)", report.natural, size)]
    if report.publishable:
        attack = report.attack.split(":")[0]
        title = f"Robust accuracy ({report.threat_model}, {attack}, {report.robust.total:,} images)"
        metrics.append((title, report.robust, {**size, **threat}))
    return [
        EvalResult(
            **common,
            metric_name=title,
            metric_value=accuracy.value,
            metric_args={**arguments, "confidence_interval_95": [accuracy.low, accuracy.high]},
        )
        for title, accuracy, arguments in metrics
    ]
