"""Robust accuracy against adapter size: extraction from `mode="full"` models, measured on digits.

Two models: the quickstart's backbone (0.36 M parameters), and a timm ResNet-18 (11 M) that this script first trains
adversarially on a part of Fashion-MNIST. Both are fine-tuned with AutoLoRa in mode `full` on 950 MNIST digits, as
`autolora quickstart` does, and an adapter is extracted for every size:

- `cut`: the truncated weight change, nothing else;
- `statistics`: running statistics of the norms estimated anew on adversarial examples of the training digits;
- `repair`: the latter, trained for some epochs on the training digits.

    python scripts/extraction_curve.py --model quickstart --autoattack-images 100
    apt-get install dataset-fashion-mnist
    python scripts/extraction_curve.py --model resnet18 --pgd-images 200 --repair-epochs 1
    python scripts/extraction_curve.py --model quickstart --weightings --sizes 0.05 0.1 0.2

The test digits are measured, and used for nothing else; what was compared to make a choice (`--weightings`) was
compared on digits that are neither training nor test digits. Every finished point is written at once, and a run that
was stopped goes on behind it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pretrain_quickstart_backbone import LABELS, MEAN, STD, augment, read_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import PrinterCallback

from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraModel,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    ThreatModel,
    evaluate_robustness,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.attacks.pgd import logits_of
from autolora_hf.data import as_pixel_dataset, stratified_split, stratified_subset
from autolora_hf.evaluation import RobustnessReport
from autolora_hf.files import save_tensors, write_json
from autolora_hf.hub import extraction
from autolora_hf.hub.extraction import Extraction, extract_adapter
from autolora_hf.hub.norm_statistics import adversarial_examples, recalibrate
from autolora_hf.hub.weight_change import LayerChange, WeightChange
from autolora_hf.layout import base_tensors
from autolora_hf.pixels import Normalize
from autolora_hf.quickstart import load_digits


EPS, BATCH_SIZE, ATTACK_STEPS, TRAIN_IMAGES = 0.1, 32, 5, 1000
SIZES = {"quickstart": (0.02, 0.03, 0.05, 0.1, 0.2, 0.4), "resnet18": (0.005, 0.01, 0.02, 0.05, 0.1)}
# The size at which AutoAttack is run, besides the base and the full model.
KEY_SIZE = 0.1
VARIANTS = ("cut", "statistics", "repair")


class Digits:
    """MNIST digits: pixels in [0, 1], N x 3 x 28 x 28, and labels N.

    Attributes:
        train (`TensorDataset`): The 1,000 that `autolora quickstart` trains with, 50 of which the trainer holds out.
        fitted (`TensorDataset`): The other 950 of them, for running statistics.
        unused (`TensorDataset`): 1,000 further ones of the training split, to compare ways of extracting.
        test: The test split.
    """

    def __init__(self, preprocessing: Preprocessing, seed: int) -> None:
        splits = load_digits()
        labels = splits["train"]["label"]
        chosen = stratified_subset(labels, TRAIN_IMAGES, seed)
        pixels = as_pixel_dataset(splits["train"], preprocessing)

        def tensors(indices: list[int]) -> TensorDataset:
            items = [pixels[index] for index in indices]
            return TensorDataset(
                torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])
            )

        self.train = tensors(chosen)
        kept, _ = stratified_split([labels[index] for index in chosen], 0.05, seed)
        self.fitted = TensorDataset(*(tensor[kept] for tensor in self.train.tensors))
        known = set(chosen)
        self.unused = tensors([index for index in range(len(labels)) if index not in known][::3])
        self.test = splits["test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="quickstart")
    parser.add_argument("--sizes", type=float, nargs="+", help="Shares of the full model's stored values.")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS)
    parser.add_argument("--epochs", type=int, default=8, help="Of the training in mode full.")
    parser.add_argument("--repair-epochs", type=int, default=2)
    parser.add_argument("--repair-learning-rate", type=float, default=1e-3)
    parser.add_argument("--pgd-images", type=int, default=1000, help="Test digits for PGD-20.")
    parser.add_argument("--autoattack-images", type=int, default=0, help="Test digits for AutoAttack.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/extraction_curve.json"))
    parser.add_argument("--work", type=Path, default=Path("extraction-curve"), help="Folder for trained models.")
    parser.add_argument(
        "--pretrain-images", type=int, default=10_000, help="Fashion-MNIST images an epoch, ResNet-18."
    )
    parser.add_argument("--pretrain-epochs", type=int, default=1)
    parser.add_argument("--weightings", action="store_true", help="Compare weightings of the layers, nothing else.")
    parser.add_argument("--draw", action="store_true", help="Only draw the figure and print the tables.")
    args = parser.parse_args()
    args.sizes = args.sizes or SIZES[args.model]
    args.work = args.work / args.model
    # What the trainer says every epoch would hide the points.
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

    if not args.draw:
        record = Recorder(args)
        base = quickstart_base if args.model == "quickstart" else resnet18_base
        (compare_weightings if args.weightings else measure_curve)(args, record, base)
    content = json.loads(args.output.read_text())
    print_tables(content)
    draw(content, args.output.with_suffix(".png"))


class Recorder:
    """The results of one model in a JSON file that is written anew, whole, after every point."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.output
        self.content = json.loads(self.path.read_text()) if self.path.is_file() else {}
        settings = {
            key: value
            for key, value in vars(args).items()
            if key not in ("output", "work", "draw", "weightings", "sizes", "variants", "autoattack_images", "model")
            and (args.model == "resnet18" or not key.startswith("pretrain"))
        }
        known = self.content.setdefault(
            args.model, {"settings": settings, "points": {}, "autoattack": {}, "weightings": {}}
        )
        if known["settings"] != settings:
            raise SystemExit(f"{self.path} was measured with other settings ({known['settings']}): choose --output.")
        self.own = known
        self.own |= {
            "date": datetime.date.today().isoformat(),
            "device": f"{os.cpu_count()} {platform.machine()} CPU cores, one thread",
            "versions": {p: importlib.metadata.version(p) for p in ("autolora-hf", "torch", "timm", "peft")},
        }

    def point(self, group: str, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Adds a point unless it is there."""
        if key in self.own[group]:
            return
        started = time.time()
        found = measure()
        found["seconds"] = round(time.time() - started, 1)
        self.own[group][key] = found
        write_json(self.content, self.path)
        shown = {name: f"{100 * value['value']:.1f}" for name, value in found.items() if name in ("natural", "robust")}
        print(f"{key:24} {found.get('values', ''):>10}  {shown}  {found['seconds']:.0f} s", flush=True)


def accuracies(report: RobustnessReport) -> dict[str, Any]:
    return {
        name: {"value": found.value, **vars(found)}
        for name, found in (("natural", report.natural), ("robust", report.robust))
    }


# ---- the models ----


def quickstart_base(args: argparse.Namespace) -> AutoLoraModel:
    torch.manual_seed(args.seed)
    model = get_autolora_model("quickstart", AutoLoraConfig(mode="full"), label_names=list("0123456789"))
    # The checkpoint's head knows ten kinds of clothing, not ten digits.
    model.heads[0].reset_parameters()
    return model


def resnet18_base(args: argparse.Namespace) -> AutoLoraModel:
    """A ResNet-18, adversarially trained on Fashion-MNIST, with a new head."""
    folder = args.work / "backbone"
    if not (folder / "config.json").is_file():
        _pretrain(args, folder)
    torch.manual_seed(args.seed)
    model = get_autolora_model(str(folder), AutoLoraConfig(mode="full"), label_names=list("0123456789"))
    model.heads[0].reset_parameters()
    return model


def _pretrain(args: argparse.Namespace, folder: Path) -> None:
    """PGD adversarial training with three steps, in the manner of scripts/pretrain_quickstart_backbone.py."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pixels, labels = read_split(Path("/usr/share/datasets/fashion-mnist"), "train")
    network = timm.create_model("resnet18", num_classes=10)
    model = nn.Sequential(Normalize(Preprocessing((28, 28), MEAN, STD, crop_pct=1.0)), network)
    steps, max_lr = args.pretrain_epochs * (args.pretrain_images // 128), 0.05
    optimizer = torch.optim.SGD(model.parameters(), max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps, pct_start=0.3)
    started, hits = time.time(), 0.0
    for step in range(steps):
        # The radius grows over the first half: from random weights the full one stalls.
        eps = EPS * min(1.0, 0.25 + 1.5 * step / steps)
        chosen = torch.randint(len(labels), (128,), generator=generator)
        x, y = augment(pixels[chosen], generator), labels[chosen]
        adversarial = PGD(ThreatModel("linf", eps), steps=3, step_size=0.5 * eps)(model, x, y, generator=generator)
        model.train()
        logits = model(adversarial)
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        schedule.step()
        hits = 0.98 * hits + 0.02 * (logits.argmax(1) == y).float().mean().item()
        if step % 20 == 19:
            accuracy, seconds = hits / (1 - 0.98 ** (step + 1)), time.time() - started
            print(f"pre-training {step + 1}/{steps}, robust accuracy {accuracy:.3f}, {seconds:.0f} s", flush=True)
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "num_features": network.num_features,
        "pretrained_cfg": {
            "input_size": [3, 28, 28],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": MEAN,
            "std": STD,
            "num_classes": 10,
            "pool_size": [1, 1],
            "first_conv": "conv1",
            "classifier": "fc",
            "label_names": LABELS,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(network.state_dict(), folder / "model.safetensors")
    write_json(config, folder / "config.json")


def train(args: argparse.Namespace, model: AutoLoraModel, digits: Digits, name: str, **options: Any) -> AutoLoraModel:
    """A training as `autolora quickstart` runs it."""
    arguments = AutoLoraTrainingArguments(
        output_dir=str(args.work / name),
        eps=EPS,
        per_device_train_batch_size=BATCH_SIZE,
        attack_steps=ATTACK_STEPS,
        attack_step_size=1.25 * EPS / ATTACK_STEPS,
        augmentation="crop",
        save_total_limit=1,
        seed=args.seed,
        disable_tqdm=True,
        **options,
    )
    trainer = AutoLoraTrainer(model, arguments, train_dataset=digits.train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def trained(args: argparse.Namespace, record: Recorder, base: AutoLoraModel, digits: Digits) -> AutoLoraModel:
    folder = args.work / "full"
    if not (folder / "autolora_config.json").is_file():
        started = time.time()
        train(args, base, digits, "run", num_train_epochs=args.epochs).save_pretrained(folder)
        record.own["training_seconds"] = round(time.time() - started, 1)
    model = load_autolora_model(folder)
    model.threat_model = ThreatModel("linf", EPS)
    return model


# ---- the curve ----


def measure_curve(args: argparse.Namespace, record: Recorder, make_base: Callable) -> None:
    base = make_base(args)
    base.threat_model = ThreatModel("linf", EPS)
    digits = Digits(base.preprocessing, args.seed)
    pgd = PGD(base.threat_model, steps=20)

    options = {"seed": args.seed, "progress": False, "diagnostics": False}

    def measure(model: AutoLoraModel, values: int, **more: Any) -> dict[str, Any]:
        report = evaluate_robustness(model, digits.test, attack=pgd, max_samples=args.pgd_images, **options)
        return {"values": values, "size": values / full_values, **more, **accuracies(report)}

    full_values = sum(tensor.numel() for tensor in base_tensors(base).values())
    record.point("points", "base", lambda: measure(base.eval(), 0))
    full = trained(args, record, base, digits)
    record.point("points", "full", lambda: measure(full, full_values))

    def full_with_new_statistics() -> dict[str, Any]:
        model = load_autolora_model(args.work / "full")
        model.threat_model = full.threat_model
        recalibrate(model, digits.fitted)
        return measure(model, full_values)

    record.point("points", "full, statistics", full_with_new_statistics)

    def extracted(size: float, variant: str) -> dict[str, Any]:
        calibration = None if variant == "cut" else digits.fitted
        result: Extraction = extract_adapter(full, size=size, calibration=calibration)
        if variant == "repair":
            torch.manual_seed(args.seed)
            repair = {"num_train_epochs": args.repair_epochs, "learning_rate": args.repair_learning_rate}
            train(args, result.model, digits, "repair", **repair)
        more = {"explained": result.total_explained, "ranks": result.ranks, "left_out": result.left_out}
        if size == KEY_SIZE:
            result.model.save_pretrained(args.work / f"{size:g} {variant}")
        return measure(result.model, result.values, **more)

    for size in sorted(args.sizes, key=lambda size: (size != KEY_SIZE, -size)):
        for variant in args.variants:
            record.point("points", f"{size:g} {variant}", lambda size=size, variant=variant: extracted(size, variant))

    def full_trained_on() -> dict[str, Any]:
        # What the same further training does without a cut: the fair comparison for `repair`.
        model = load_autolora_model(args.work / "full")
        train(args, model, digits, "repair", num_train_epochs=args.repair_epochs)
        return measure(model, full_values)

    if "repair" in args.variants:
        record.point("points", "full, repair", full_trained_on)

    def autoattack(key: str) -> dict[str, Any]:
        model = make_base(args).eval() if key == "base" else load_autolora_model(args.work / key)
        model.threat_model = full.threat_model
        report = evaluate_robustness(model, digits.test, max_samples=args.autoattack_images, **options)
        return {"images": len(report.sample_indices), **accuracies(report)}

    if args.autoattack_images:
        for key in ("full", *(f"{KEY_SIZE:g} {variant}" for variant in ("cut", "repair")), "base"):
            record.point("autoattack", key, lambda key=key: autoattack(key))


# ---- is a weighting of the layers needed? ----


def compare_weightings(args: argparse.Namespace, record: Recorder, make_base: Callable) -> None:
    """Extracts with several measures of what a change of the weight does; on digits that nothing was trained with.

    - `plain`: squared Frobenius norm, what the package does;
    - `relative`: divided by that of the layer's weight;
    - `fisher`: the second-order change of the loss, with a Kronecker-factored Fisher matrix of the robust model on
      adversarial training digits (Martens and Grosse, ICML 2015): for gradients g of the outputs and inputs a of a
      layer, `|E[gg']^(1/2) dW E[aa']^(1/2)|^2`, cut where that is least.
    """
    base = make_base(args)
    digits = Digits(base.preprocessing, args.seed)
    full = trained(args, record, base, digits)
    pgd = PGD(full.threat_model, steps=20)
    images = adversarial_examples(full, as_pixel_dataset(digits.fitted, full.preprocessing))
    factors = None
    for weighting in ("plain", "relative", "fisher"):
        change = WeightChange(full, None)
        if weighting == "fisher":
            factors = _fisher_factors(full, list(change.layers), images)
        for name, layer in change.layers.items():
            if weighting == "relative":
                scale = change.old[f"{name}.weight"].double().norm()
                # Only the order of the triples changes: what is stored is the same product.
                change.layers[name] = _scaled(layer, 1 / scale)
            elif weighting == "fisher":
                change.layers[name] = _weighted(layer, *factors[name])
        for size in args.sizes:
            for variant, statistics in (("cut", None), ("statistics", images)):

                def measure(change: Any = change, size: float = size, statistics: Any = statistics) -> dict[str, Any]:
                    result = extraction._extract(change, size, None, statistics, None)
                    report = evaluate_robustness(
                        result.model, digits.unused, attack=pgd, progress=False, diagnostics=False
                    )
                    return {"values": result.values, "ranks": result.ranks, **accuracies(report)}

                record.point("weightings", f"{size:g} {variant} {weighting}", measure)


def _scaled(layer: Any, factor: float) -> Any:
    # Scaled triples, with the factor taken out again on the left.
    return LayerChange(
        layer.left / factor, layer.sigma * factor, layer.right, layer.squared_norm * factor**2, layer.stock
    )


def _weighted(layer: Any, gradients: Tensor, inputs: Tensor) -> Any:
    outer, outer_inverse = _roots(gradients)
    inner, inner_inverse = _roots(inputs)
    matrix = outer @ (layer.left * layer.sigma @ layer.right) @ inner
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    norm = float(sigma.square().sum())
    return LayerChange(outer_inverse @ left, sigma, right @ inner_inverse, norm, layer.stock)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix and its inverse, with a little damping."""
    damping = 1e-4 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    values, vectors = torch.linalg.eigh(matrix + damping)
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T


def _fisher_factors(model: AutoLoraModel, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each convolution the sums of `gg'` and of `aa'` over images and places, in float64."""
    network = copy.deepcopy(model).merge_and_unload()
    sums: dict[str, list[Any]] = {name: [0.0, 0.0] for name in names}

    def watch(name: str) -> Callable:
        def hook(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            patches = F.unfold(inputs[0].detach(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            patches = patches.transpose(1, 2).flatten(0, 1).double()
            sums[name][1] = sums[name][1] + patches.T @ patches

            def gradient_hook(gradient: Tensor) -> None:
                columns = gradient.transpose(0, 1).flatten(1).double()
                sums[name][0] = sums[name][0] + columns @ columns.T

            output.register_hook(gradient_hook)

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    normalize, generator = Normalize(model.preprocessing), torch.Generator().manual_seed(0)
    for batch in images.split(100):
        logits = logits_of(network(normalize(batch)))
        # Labels drawn from the model itself: with those of the data it would not be the Fisher matrix.
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: (first, second) for name, (first, second) in sums.items()}


# ---- tables and figure ----


def print_tables(content: dict[str, Any]) -> None:
    """The measurements in Markdown, accuracies in per cent with 95 % Clopper-Pearson intervals."""

    def shown(accuracy: dict[str, Any]) -> str:
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * accuracy[key] for key in ("value", "low", "high")))

    for name, own in content.items():
        points = own["points"]
        if "full" not in points:
            continue
        base, full = (points[key]["robust"]["value"] for key in ("base", "full"))
        print(f"\n### {name}\n\n| | values | size, % | natural | PGD-20 | gain kept, % | AutoAttack |")
        print("|---|--:|--:|---|---|--:|---|")
        for key, point in sorted(points.items(), key=lambda item: item[1]["size"]):
            kept = 100 * (point["robust"]["value"] - base) / (full - base)
            attacked = own["autoattack"].get(key)
            print(
                f"| {key} | {point['values']:,} | {100 * point['size']:.1f} | {shown(point['natural'])} | "
                f"{shown(point['robust'])} | {kept:.0f} | {shown(attacked['robust']) if attacked else '-'} |"
            )
        if own["weightings"]:
            print("\n| | natural | PGD-20 |\n|---|---|---|")
        for key, point in own["weightings"].items():
            print(f"| {key} | {shown(point['natural'])} | {shown(point['robust'])} |")


# Okabe and Ito's palette, which readers with any colour vision can tell apart.
_STYLES = {
    "cut": ("#0072B2", "o-", "cut only"),
    "statistics": ("#E69F00", "s-", "and norm statistics estimated anew"),
    "repair": ("#00795A", "^-", "and trained on ({epochs} epochs)"),
}
_TITLES = {"quickstart": "quickstart backbone", "resnet18": "ResNet-18"}


def draw(content: dict[str, Any], path: Path) -> None:
    """Robust accuracy against size, one panel a model; intervals are 95 % Clopper-Pearson."""
    models = [name for name in SIZES if content.get(name, {}).get("points", {}).get("full")]
    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        points, settings = content[name]["points"], content[name]["settings"]
        base, full = (points[key]["robust"]["value"] for key in ("base", "full"))
        for level, label, style in (
            (full, "full model", "-"),
            (base + 0.9 * (full - base), "90 % of the gain", "--"),
            (base, "before training", ":"),
        ):
            axes.axhline(100 * level, color="#555555", linestyle=style, linewidth=1, label=label)
        for variant, (color, style, label) in _STYLES.items():
            found = sorted(
                (p["size"], p)
                for key, p in points.items()
                if key.endswith(f" {variant}") and not key.startswith("full")
            )
            if not found:
                continue
            values = [100 * point["robust"]["value"] for _, point in found]
            errors = [
                [100 * (p["robust"]["value"] - p["robust"]["low"]) for _, p in found],
                [100 * (p["robust"]["high"] - p["robust"]["value"]) for _, p in found],
            ]
            count = settings["repair_epochs"]
            label = label.format(epochs=count) if count != 1 else label.replace("{epochs} epochs", "1 epoch")
            sizes = [100 * size for size, _ in found]
            axes.errorbar(sizes, values, errors, fmt=style, color=color, label=label, capsize=2, linewidth=1.5)
            key = f"{KEY_SIZE:g} {variant}"
            if key in content[name]["autoattack"]:
                value = 100 * content[name]["autoattack"][key]["robust"]["value"]
                axes.plot(100 * points[key]["size"], value, "*", color=color, markersize=13, markeredgecolor="black")
        if content[name]["autoattack"]:
            axes.plot(
                [], [], "*", color="white", markersize=13, markeredgecolor="black", label="AutoAttack, fewer digits"
            )
        axes.set_xscale("log")
        ticks = sorted({round(100 * p["size"], 1) for key, p in points.items() if key.endswith(" cut")})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        values = points["full"]["values"]
        axes.set_title(
            f"{_TITLES[name]}, {values / 1e6:.2g} M values; {points['full']['robust']['total']:,} test digits"
        )
        axes.set_xlabel("stored values of the adapter, % of the full model")
        axes.set_ylabel("robust accuracy, PGD-20, %")
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
