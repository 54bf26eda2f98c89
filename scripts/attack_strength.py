"""Does an attack in reduced precision stay as strong as in float32?

Trains small networks of three kinds, naturally and adversarially, on 4,000 coloured digits (MNIST digits of the
quickstart, each in two random colours, 32 x 32), and attacks 1,000 test images with PGD-10 at radii from 0.5/255 to
16/255. Every row compares searches from the same random starts: the network as it is (float32, nothing folded), the
exact copy that attacks use by default, the copy in bfloat16, and that one compiled. The network itself, in float32,
judges all of them. Writes docs/attack_strength.json and docs/attack_strength.md.

    python scripts/attack_strength.py
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from benchmark_cases import cpu_name, digits
from torch import Tensor, nn

from autolora_hf import PGD, AutoLoraModel, Preprocessing, ThreatModel, get_autolora_model, load_autolora_model
from autolora_hf.attacks.pgd import attack_mode, hits
from autolora_hf.attacks.precision import LEAST_CHANGE, bf16_keeps_strength
from autolora_hf.files import read_json, write_atomically, write_json
from autolora_hf.frozen import FrozenRoute
from autolora_hf.pixels import Normalize
from autolora_hf.quickstart import load_digits


SIZE = 32
PREPROCESSING = Preprocessing((SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-18": ("resnet18", {}),
    "ConvNeXt-atto": ("convnext_atto", {}),
    "ViT, 4 blocks of width 64": (
        "vit_tiny_patch16_224",
        {"img_size": SIZE, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2},
    ),
}
# The robust model of `model_cards/quickstart-digits`, on the plain digits that it was trained for.
PUBLISHED = "ResNet of the quickstart"
RADII = [("linf", radius / 255) for radius in (0.5, 1, 2, 4, 8, 16)] + [("l2", eps) for eps in (0.1, 0.25, 0.5, 1.0)]
PUBLISHED_RADII = [("linf", eps) for eps in (2 / 255, 4 / 255, 8 / 255, 0.1, 0.2)] + [
    ("l2", eps) for eps in (0.5, 1, 2)
]
BATCH = 100
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def coloured_digits(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Pixels N x 3 x 32 x 32 in [0, 1], each digit in a colour of its own on another one, and labels N."""
    rows = load_digits()[split].shuffle(seed=0).select(range(count))
    strokes = torch.stack([torch.from_numpy(np.array(image)) for image in rows["image"]])[:, None].float() / 255
    strokes = F.pad(strokes, (2, 2, 2, 2))
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    paper = torch.rand(count, 3, 1, 1, generator=generator)
    # At least 0.3 away from the paper in every channel, so that all digits can be read.
    ink = (paper + 0.3 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator)) % 1
    return paper + (ink - paper) * strokes, torch.tensor(rows["label"])


def train(kind: str, robust: bool, epochs: int, images: int) -> AutoLoraModel:
    """AdamW with one cycle; adversarially with PGD-3 at 8/255, after a first epoch of clean images."""
    torch.manual_seed(0)
    architecture, arguments = NETWORKS[kind]
    network = timm.create_model(architecture, num_classes=10, **arguments)
    model = nn.Sequential(Normalize(PREPROCESSING), network).train()
    pixels, labels = coloured_digits("train", images)
    attack = PGD(ThreatModel("linf", 8 / 255), steps=3, step_size=4 / 255)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        inputs = pixels[chosen]
        if robust and step >= steps // epochs:
            inputs = attack(model, inputs, labels[chosen], generator=generator)
        loss = F.cross_entropy(model(inputs), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return get_autolora_model(network.eval(), preprocessing=PREPROCESSING).eval()


def searches(model: AutoLoraModel, compiled: bool) -> dict[str, nn.Module]:
    """What attacks search on, by name; the first is what the others are compared with."""
    found = {
        "plain": model.pixel_space(),
        "exact": FrozenRoute(model),
        "bf16": FrozenRoute(model, dtype=torch.bfloat16),
    }
    if compiled:
        found["bf16_compiled"] = FrozenRoute(model, dtype=torch.bfloat16, compiled_batch=BATCH)
    return found


def measure(model: AutoLoraModel, search: nn.Module, threat_model: ThreatModel, data: tuple[Tensor, Tensor]) -> dict:
    """Mean cross-entropy reached and images that withstand, judged by the float32 model."""
    attack, judge = PGD(threat_model), model.pixel_space()
    losses, robust = [], []
    for number, (pixels, labels) in enumerate(zip(*(part.split(BATCH) for part in data), strict=True)):
        generator = torch.Generator().manual_seed(number)
        adversarial = attack(search, pixels, labels, generator=generator)
        with torch.no_grad():
            logits = judge(adversarial)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        robust.append(hits(logits, labels))
    return {"loss": torch.cat(losses).mean().item(), "robust": int(torch.cat(robust).sum())}


def cosine(model: AutoLoraModel, data: tuple[Tensor, Tensor]) -> float:
    """Median cosine of an image's input gradients in float32 and in bfloat16."""
    pixels, labels = (part[:BATCH] for part in data)
    gradients = []
    with attack_mode(model):
        for search in (model.pixel_space(), FrozenRoute(model, dtype=torch.bfloat16)):
            given = pixels.clone().requires_grad_()
            loss = F.cross_entropy(search(given), labels, reduction="sum")
            gradients.append(torch.autograd.grad(loss, given)[0].flatten(1))
    return F.cosine_similarity(*gradients).median().item()


def rows_of(kind: str, robust: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    if kind == PUBLISHED:
        model, radii = load_autolora_model(ROOT / "model_cards" / "quickstart-digits").eval(), PUBLISHED_RADII
        data = digits(load_digits()["test"], model, args.images)
    else:
        model, radii = train(kind, robust, args.epochs, args.train_images), RADII
        data = coloured_digits("test", args.images)
    with torch.no_grad():
        logits = model.pixel_space()(data[0])
    common = {
        "network": kind,
        "training": "adversarial" if robust else "natural",
        "images": args.images,
        "natural": int(hits(logits, data[1]).sum()),
        "clean_loss": F.cross_entropy(logits, data[1]).item(),
        "gradient_cosine": cosine(model, data),
    }
    rows = []
    candidates = searches(model, args.compiled)
    for norm, eps in radii:
        threat_model = ThreatModel(norm, eps)
        found = {name: measure(model, search, threat_model, data) for name, search in candidates.items()}
        rows.append({**common, "norm": norm, "eps": eps, "threat_model": _named(threat_model), **found})
        print(rows[-1], flush=True)
    return rows


def _named(threat_model: ThreatModel) -> str:
    if threat_model.norm == "l2":
        return f"L2 {threat_model.eps:g}"
    return f"Linf {threat_model.eps * 255:g}/255"


# ---- the page ----


def render(report: dict[str, Any]) -> str:
    rows, least = report["rows"], f"{LEAST_CHANGE * 255:g}/255"
    strong = [row for row in rows if _is_strong(row)]
    weak = [row for row in rows if not _is_strong(row)]
    lines = [
        "# Strength of fast attacks",
        "",
        f"`python scripts/attack_strength.py`, {report['date']}, {report['device']}, torch {report['torch']}. "
        f"PGD-10 from the same random starts on {rows[0]['images']:,} digits, judged by the float32 network.",
        "",
        "Loss is the mean cross-entropy reached, as a ratio to the search on the network as it is (float32, nothing "
        "folded); below 1 the attack is weaker. Robust is the number of images that withstand, and in brackets by how "
        "many more or fewer the others count.",
        "",
        f"- Where attacks use bfloat16 with `bf16=True` (changes of {least} a pixel and more): loss ratios "
        f"{_range(strong, 'bf16')}, robust counts differ by at most {_most(strong, 'bf16')} images.",
        f"- Below it: loss ratios {_range(weak, 'bf16')}, robust counts differ by at most {_most(weak, 'bf16')}.",
        f"- The exact copy: loss ratios {_range(rows, 'exact')}, robust counts differ by at most "
        f"{_most(rows, 'exact')}.",
        *_compiled_line(strong),
        "",
        "The coloured digits are hard for these small networks: the adversarially trained ones and the ViT are little "
        "better than guessing (second table), so of them the rows say only that gradients agree. The robust model of "
        "the quickstart, on its plain digits, is one that works.",
        "",
        "Images are of 32 x 32 pixels and less. For L2 the rule goes by the mean change of a pixel, and for larger "
        "images that is an extrapolation.",
    ]
    names = [name for name in ("exact", "bf16", "bf16_compiled") if name in rows[0]]
    titles = {"exact": "exact copy", "bf16": "bfloat16", "bf16_compiled": "bfloat16, compiled"}
    head = ["Network", "Training", "Threat model", "Loss", "Robust", *(titles[name] for name in names)]
    lines += ["", "| " + " | ".join(head) + " |", "|---|---|---|---:|---:|" + "---:|" * len(names)]
    for row in rows:
        cells = [f"{row[name]['loss'] / row['plain']['loss']:.4f} ({_gap(row, name):+d})" for name in names]
        shown = [row["network"], row["training"], row["threat_model"], f"{row['plain']['loss']:.3f}"]
        lines.append("| " + " | ".join([*shown, str(row["plain"]["robust"]), *cells]) + " |")
    lines += ["", "Clean images, and how alike the input gradients in float32 and bfloat16 are (median cosine):", ""]
    lines += ["| Network | Training | Right | Loss | Cosine |", "|---|---|---:|---:|---:|"]
    seen = {(row["network"], row["training"]): row for row in rows}
    for (network, training), row in seen.items():
        figures = f"{row['natural']} | {row['clean_loss']:.3f} | {row['gradient_cosine']:.4f}"
        lines.append(f"| {network} | {training} | {figures} |")
    return "\n".join(lines) + "\n"


def _compiled_line(strong: list[dict[str, Any]]) -> list[str]:
    name = "bf16_compiled"
    if name not in strong[0]:
        return []
    return [
        f"- bfloat16, compiled, at {LEAST_CHANGE * 255:g}/255 and more: loss ratios {_range(strong, name)}, robust "
        f"counts differ by at most {_most(strong, name)}."
    ]


def _is_strong(row: dict[str, Any]) -> bool:
    return bf16_keeps_strength(ThreatModel(row["norm"], row["eps"]), (SIZE, SIZE))


def _gap(row: dict[str, Any], name: str) -> int:
    return row[name]["robust"] - row["plain"]["robust"]


def _range(rows: list[dict[str, Any]], name: str) -> str:
    ratios = [row[name]["loss"] / row["plain"]["loss"] for row in rows]
    return f"{min(ratios):.4f} to {max(ratios):.4f}"


def _most(rows: list[dict[str, Any]], name: str) -> int:
    return max(abs(_gap(row, name)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="Test images to attack.")
    parser.add_argument("--train-images", type=int, default=4000, help="Training images.")
    parser.add_argument("--epochs", type=int, default=8, help="Training epochs of each network.")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="With torch.compile.")
    parser.add_argument(
        "--only", choices=[*NETWORKS, PUBLISHED], nargs="*", default=[*NETWORKS, PUBLISHED], help="Networks."
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="Folder of the page and its figures.")
    parser.add_argument("--render", action="store_true", help="Only write the page anew, from the figures.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.output / "attack_strength.json"
    if not args.render:
        for kind in args.only:
            trainings = (True,) if kind == PUBLISHED else (False, True)
            rows = [row for robust in trainings for row in rows_of(kind, robust, args)]
            # The other networks' rows stay: the script can be run in pieces.
            others = [row for row in read_json(file)["rows"] if row["network"] != kind] if file.is_file() else []
            rows = sorted([*others, *rows], key=lambda row: [*NETWORKS, PUBLISHED].index(row["network"]))
            date, device = datetime.date.today().isoformat(), f"{cpu_name()}, 1 thread"
            write_json({"date": date, "device": device, "torch": torch.__version__, "rows": rows}, file)
    write_atomically(args.output / "attack_strength.md", render(read_json(file)).encode())


if __name__ == "__main__":
    main()
