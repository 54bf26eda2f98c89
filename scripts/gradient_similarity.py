"""Do natural and adversarial gradients of the feature extractor disagree, and does a branch make them agree?

That they diverge is why AutoLoRa has a branch (Xu et al., ICLR 2024). Trains the quickstart's task (950 digits, 8
epochs) with AutoLoRa, with AutoLoRa without its stop-gradient, with its loss through one route (TRADES with automatic
scalars) and with TRADES, in both modes, two seeds each, and logs the cosine of the two gradients before the first
epoch and after each. At the end, with the best weights, the adversarial term is taken apart. Writes
docs/gradient_similarity.json after every run, so that it can be stopped and started again, docs/gradient_similarity.md
and docs/gradient_similarity.png.

    python scripts/gradient_similarity.py
    python scripts/gradient_similarity.py --render            # page and picture of what is there
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from autolora_hf import AutoLoraTrainer, config_for
from autolora_hf.data import collate
from autolora_hf.files import read_json, write_atomically, write_json
from autolora_hf.objectives import AutoLora
from autolora_hf.quickstart import QuickstartSettings, train_on_digits
from autolora_hf.routes import NATURAL, ROBUST
from autolora_hf.schedules import LossScalars
from autolora_hf.training.gradient_similarity import (
    COSINE,
    COSINE_BRANCH,
    cosine,
    feature_gradients,
    gradient_cosine,
)
from autolora_hf.training.streams import some_items


DOCS = Path(__file__).parents[1] / "docs"
NAME = "gradient_similarity"
MODES = {"full": "the whole network trains", "adapter": "adapters train"}
# Images that the parts of the adversarial term are measured on.
IMAGES = 256


@dataclass(frozen=True)
class System:
    """A way to train: objective, its options, and further fields of `AutoLoraConfig`."""

    objective: str
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    color: str = "black"


SYSTEMS = {
    "AutoLoRa": System("autolora", color="#0072B2"),
    "AutoLoRa, no stop-gradient": System("autolora", config={"stop_gradient": False}, color="#00795A"),
    "AutoLoRa's loss, one route": System("trades", {"automatic": True}, color="#E69F00"),
    "TRADES": System("trades", color="#C43C00"),
}
# What is left of AutoLoRa's adversarial term with these scalars.
PARTS = {"cross-entropy": LossScalars(0, 0), "KL": LossScalars(1, 1)}


def run(name: str, mode: str, seed: int, epochs: int, images: int) -> dict[str, Any]:
    system = SYSTEMS[name]
    settings = QuickstartSettings(mode=mode, epochs=epochs, train_images=images, seed=seed)
    config = config_for(system.objective, "quickstart", mode=mode, **system.config)
    arguments = {"gradient_similarity": True, "objective_kwargs": system.options}
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_on_digits(system.objective, settings, Path(folder), quiet=True, config=config, **arguments)
    log = trainer.state.log_history
    curves = {key: [entry[key] for entry in log if key in entry] for key in (COSINE, COSINE_BRANCH)}
    best = max(entry.get("eval_robust_accuracy", 0) for entry in log)
    return {"system": name, "mode": mode, "seed": seed, **curves, "robust": best, **parts(trainer)}


def parts(trainer: AutoLoraTrainer) -> dict[str, Any]:
    """With the best weights: the cosines for each part of the adversarial term, and what a stop-gradient lets in."""
    model, args = trainer.model, trainer.args
    batch = collate(some_items(trainer.train_dataset, args.seed, IMAGES))
    pixels, labels = batch["pixel_values"], batch["labels"]
    adversarial = args.training_attack()(model.pixel_space(ROBUST), pixels, labels)
    images = (pixels, adversarial, labels)
    found: dict[str, Any] = {}
    alone = feature_gradients(model, AutoLora(), *images, PARTS["KL"])[0]
    routes = {"without": ROBUST, "with": NATURAL} if NATURAL in model.adapters else {"without": ROBUST}
    for where, route in routes.items():
        for part, scalars in PARTS.items():
            found[f"{part} {where}"] = gradient_cosine(model, AutoLora(), *images, scalars, route)
        detached = AutoLora(detach_target=True)
        found[f"KL, target detached {where}"] = gradient_cosine(model, detached, *images, PARTS["KL"], route)
        # How far the branch turns the natural gradient itself.
        natural = feature_gradients(model, AutoLora(), *images, PARTS["KL"], route)[0]
        found[f"natural {where}"] = cosine(natural, alone)
    if NATURAL in model.adapters:
        arriving, _ = feature_gradients(model, AutoLora(), *images, PARTS["KL"], NATURAL, stop_gradient=True)
        found["arriving"] = sum(gradient.square().sum().item() for gradient in arriving) ** 0.5
    return {"parts": found}


# ---- the page ----


def after_training_began(rows: list[dict[str, Any]], key: str) -> list[float]:
    """The cosines after each epoch, of all seeds: before the first one a branch adds nothing."""
    return [value for row in rows for value in row[key][1:]]


def mean_part(rows: list[dict[str, Any]], part: str) -> float:
    return statistics.mean(row["parts"][part] for row in rows)


def findings(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures of each mode say, in words."""
    for mode, what in MODES.items():
        own = {name: [row for row in rows if row["system"] == name and row["mode"] == mode] for name in SYSTEMS}
        if not all(own.values()):
            continue
        without, with_branch = (after_training_began(own["AutoLoRa"], key) for key in (COSINE, COSINE_BRANCH))
        lower, total = sum(a < b for a, b in zip(without, with_branch, strict=True)), len(without)
        verdict = "lower" if lower > 0.9 * total else "higher" if lower < 0.1 * total else "neither lower nor higher"
        vanilla, one_route = (
            statistics.mean(after_training_began(own[name], COSINE))
            for name in ("TRADES", "AutoLoRa's loss, one route")
        )
        relation = "lower" if vanilla < statistics.mean(with_branch) else "not lower"
        route_relation = "lower, too" if one_route < statistics.mean(with_branch) else "not lower"
        arriving = max(row["parts"]["arriving"] for row in own["AutoLoRa"])
        free = min(row["parts"]["arriving"] for row in own["AutoLoRa, no stop-gradient"])
        opposed = [sum(value < 0 for value in values) for values in (without, with_branch)]
        kinds = ("cross-entropy", "KL", "KL, target detached")
        cross_entropy, kl, detached = (mean_part(own["AutoLoRa"], f"{kind} without") for kind in kinds)
        yield (
            f"- **Mode `{mode}` ({what}).** At the weights of AutoLoRa's training the cosine is {verdict} without the "
            f"branch than with it: lower in {lower} of {total} measurements (epochs of all seeds), mean "
            f"{statistics.mean(without):.2f} without and {statistics.mean(with_branch):.2f} with it. Without it the "
            f"gradients oppose each other in {opposed[0]} of {total} measurements, with it in {opposed[1]}. Along the "
            f"training with TRADES the mean is {vanilla:.2f}, {relation} than that of AutoLoRa with its branch; along "
            f"that with AutoLoRa's loss and scalars through one route it is {one_route:.2f}, {route_relation}. With "
            "AutoLoRa's best weights, without the branch, the natural gradient has the cosine "
            f"{cross_entropy:.2f} with that of the cross-entropy of adversarial images, {kl:.2f} with that of the KL "
            f"term, and {detached:.2f} with what of it comes by way of adversarial images (target detached). Of the "
            f"natural gradient the stop-gradient lets a norm of {arriving:g} through to the FE; in training without a "
            f"stop-gradient at least {free:.2g} arrives."
        )


def render(content: dict[str, Any]) -> str:
    rows = content["rows"]
    count = len({row["seed"] for row in rows})
    blocks = [
        "# Similarity of natural and adversarial gradients",
        wrap(
            f"`python scripts/gradient_similarity.py`, {content['date']}, {content['device']}, torch "
            f"{content['torch']}. The quickstart's task: {content['images']} digits of which 5 per cent are held out, "
            f"{content['epochs']} epochs, batches of {QuickstartSettings.batch_size}, PGD-"
            f"{QuickstartSettings.attack_steps}, Linf {QuickstartSettings.eps}; seeds: {count}."
        ),
        wrap(
            "AutoLoRa's motivation is that natural and adversarial objectives give the feature extractor (FE) "
            '"significantly divergent" gradients (Xu et al., ICLR 2024, abstract). Measured is the cosine between the '
            "gradients of the natural term, `CE(f(x), y)`, and of the adversarial one, `(1 - l1) CE(robust(x~), y) + "
            "l2 KL(f(x) || robust(x~))` with the scalars in force (TRADES: the KL term), of everything but the head "
            "that the deployed route trains, on one batch of training images. *Without the branch* `f` is the FE "
            "alone; *with the branch* it is the natural route, FE and branch, and its stop-gradient is left out, so "
            "that there is something to compare. Only the path of the clean images differs."
        ),
        "## What was found",
        "\n".join(wrap(finding, "  ") for finding in findings(rows)),
        wrap(
            "AutoLoRa's stop-gradient makes the conflict vanish by construction: the FE gets no natural gradient at "
            "all, whatever cosine the branch would have left. So a low cosine with the branch is no harm, and a high "
            "one no merit, of AutoLoRa as it trains; it matters for the variant without a stop-gradient only. The "
            "KL term's target is not detached, so part of its gradient comes by way of the clean images, where it "
            "draws their predictions to the adversarial ones. One small convolutional network and one small task are "
            "no test of the paper's claim, which is about backbones and tasks of another size."
        ),
        "![Cosines by epoch](gradient_similarity.png)",
        "## Cosine by epoch",
        "Mean over the seeds, before training and after each epoch. Before training the branch adds nothing.",
        "\n".join(curves_table(rows)),
        "## The adversarial term taken apart",
        wrap(
            f"Cosine between the natural gradient and that of each part of the adversarial term, with the best "
            f"weights, on {IMAGES} training images, mean over the seeds. Detached: without the gradient of the KL "
            "term's target. Last: between the natural gradient and the one without the branch."
        ),
        "\n".join(parts_table(rows)),
    ]
    return "\n\n".join(blocks) + "\n"


def wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def selected(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for mode in MODES:
        for name in SYSTEMS:
            own = [row for row in rows if row["system"] == name and row["mode"] == mode]
            if own:
                yield mode, name, own


def curves_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| mode | training | clean images | cosine by epoch | mean after the first epoch [lowest..highest seed] |"
    yield "|---|---|---|---|---:|"
    for mode, name, own in selected(rows):
        for key, path in ((COSINE, "without the branch"), (COSINE_BRANCH, "with the branch")):
            if own[0][key]:
                by_epoch = zip(*(row[key] for row in own), strict=True)
                course = " ".join(f"{statistics.mean(values):.2f}" for values in by_epoch)
                means = [statistics.mean(after_training_began([row], key)) for row in own]
                span = f"{statistics.mean(means):.2f} [{min(means):.2f}..{max(means):.2f}]"
                yield f"| {mode} | {name} | {path} | {course} | {span} |"


def parts_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| mode | training | clean images | cross-entropy | KL | KL, target detached | natural |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for mode, name, own in selected(rows):
        for where in ("without", "with"):
            if f"KL {where}" in own[0]["parts"]:
                columns = ("cross-entropy", "KL", "KL, target detached", "natural")
                cells = " | ".join(f"{mean_part(own, f'{column} {where}'):.2f}" for column in columns)
                yield f"| {mode} | {name} | {where} the branch | {cells} |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One row of panels a mode: mean over the seeds, and their span."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    figure = Figure(figsize=(10, 3.6 * len(modes) + 0.5), layout="constrained")
    panels = figure.subplots(len(modes), 2, sharex=True, sharey=True, squeeze=False)
    titles = {COSINE: "without the branch", COSINE_BRANCH: "with the branch, no stop-gradient"}
    for line, mode in zip(panels, modes, strict=True):
        for axis, (key, title) in zip(line, titles.items(), strict=True):
            for _, name, own in (found for found in selected(rows) if found[0] == mode):
                if not own[0][key]:
                    continue
                by_epoch = list(zip(*(row[key] for row in own), strict=True))
                epochs, color = range(len(by_epoch)), SYSTEMS[name].color
                axis.plot(epochs, [*map(statistics.mean, by_epoch)], "o-", color=color, label=name, markersize=4)
                span = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
                axis.fill_between(epochs, *span, color=color, alpha=0.15, linewidth=0)
            axis.axhline(0, color="#8A8A8A", linewidth=1, zorder=0.5)
            axis.set_title(f"mode {mode}: {title}", fontsize=10)
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("cosine of the two gradients")
    for axis in panels[-1]:
        axis.set_xlabel("epoch")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="Training digits, of which 5 per cent are held out.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--render", action="store_true", help="Only write page and picture anew, from the figures.")
    parser.add_argument("--output", type=Path, default=DOCS, help="Folder of the page and its figures.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.output / f"{NAME}.json"
    content = read_json(file) if file.exists() else {"rows": []}
    if not args.render:
        content |= {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "device": f"{platform.machine()} CPU, 1 thread",
            "epochs": args.epochs,
            "images": args.images,
        }
        done = {(row["system"], row["mode"], row["seed"]) for row in content["rows"]}
        for mode in MODES:
            for seed in range(args.seeds):
                for name in SYSTEMS:
                    if (name, mode, seed) not in done:
                        content["rows"].append(run(name, mode, seed, args.epochs, args.images))
                        print(content["rows"][-1], flush=True)
                        write_json(content, file)
    write_atomically(args.output / f"{NAME}.md", render(content).encode())
    draw(content["rows"], args.output / f"{NAME}.png")


if __name__ == "__main__":
    main()
