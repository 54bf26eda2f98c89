"""Writes docs/reproduction.md: the paper's tables beside what `run.py` measured, which is empty where nothing was.

python scripts/reproduce/table.py [RUNS]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paper_cells import BACKBONES, METHODS, PUBLISHED, RESULT, Figures, deviations
from paper_data import DATA_SETS

from autolora_hf.evaluation import RobustnessReport
from autolora_hf.files import read_json, write_atomically


PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
NOT_RUN = "not run"
_AXES = ("data_set", "backbone", "method")

INTRO = """# The paper's tables

Written by `python scripts/reproduce/table.py RUNS` from the results of `scripts/reproduce/run.py`; how to run them
is in [`scripts/reproduce/README.md`](../scripts/reproduce/README.md). {state}

Per cent of the test images that are classified correctly: clean (SA), under PGD-10, under AutoAttack (standard) at
Linf 8/255. Backbones: ResNets that were adversarially trained on ImageNet at Linf 4/255 (Salman et al., NeurIPS
2020). Ours: mean over seeds, ± standard deviation of a single seed where there are two or more. "Images" are the
attacked ones of each seed; a figure on few of them is uncertain beyond the spread. "Published" is the mean of three
seeds; its spread is not at hand.
"""

PROTOCOL = """
## What is not as in the paper

For all of our runs:

- **No test data in the choice of weights.** The released code has the *test* set as validation set of its schedule
  on DTD and Caltech-256. Here 5 % of the training images of every data set are held out for that, so fewer images
  train there than in the paper, and the honest figure may well be lower than the published one.
- **The route reaches every layer.** In the released code the natural route of a block that is not the last of its
  stage runs without its branch. Here every convolution of the blocks has one, as the paper says.
- **Weights**: those of the best PGD-10 accuracy on the held-out images, for every method. The held-out images are
  drawn in proportion to the classes and copies of an image stay together; the paper draws them at random.
- **PGD-10** starts at the image itself, as the released code measures it; on the held-out images it starts at random,
  where that code does not.
- **The KL term** is averaged over the images of a batch; the released code divides by 128 in a smaller last batch
  too.
- **Crops of photos** (8 to 100 % of the area) are cut out of the image itself, not out of one resized to 256.
- **Baselines**: which hyper-parameters those of the paper had is not at hand. Here vanilla RFT has a learning rate
  of 0.01, and TWINS its authors' 0.003, both divided by ten after epochs 30 and 50; TWINS' weight and weight decay
  are its authors' for CIFAR and Caltech-256, its code's defaults elsewhere.

Of the data sets:

- **DTD-57** has 47 classes. The released code gives the network 57 outputs, ten of which never occur; here it has
  47. Split 1: training and validation images train, as there.
- **Caltech-256** has no split. As in the released code the first 150 images of each class train and the rest is
  tested, so classes with no more than 150 images are never tested, and the figure is not one of all classes. In that
  code images of the classes that follow a small one are drawn twice in an epoch; here each is drawn once.
- **CIFAR** images are not enlarged: networks for 224 x 224 see 32 x 32, as in the released code.

Sources: the figures of ResNet-50 are table 2 of the paper ([arXiv 2310.01818](https://arxiv.org/abs/2310.01818); a
picture of it is in the released code's README), settings and splits are those of the released program for ImageNet
backbones (GodXuxilie/RobustSSL_Benchmark, `Finetuning_Methods/AutoLoRa/high_resolution`). Where the paper's text and
that program differ, nobody but the authors can say which of them made the tables.
"""


@dataclass(frozen=True)
class Run:
    """What the page takes of one result."""

    data_set: str
    backbone: str
    method: str
    seed: int
    figures: Figures
    images: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    where: str


def read_runs(runs: Path) -> list[Run]:
    """Every finished run in a folder.

    Raises:
        ValueError: If a result is damaged, or its two reports are of other images.
    """
    found = []
    for path in sorted(runs.glob(f"*/*/*/*/{RESULT}")):
        content = read_json(path)
        try:
            reports = {name: RobustnessReport.from_dict(report) for name, report in content["reports"].items()}
            pgd, auto = reports["pgd10"], reports["autoattack"]
            if pgd.sample_digests != auto.sample_digests:
                raise ValueError("its reports are of different images")
            if not auto.publishable:
                raise ValueError("its second report is not of AutoAttack")
            run = Run(
                *(content[name] for name in (*_AXES, "seed")),
                figures=Figures(
                    *(100 * value for value in (auto.natural_accuracy, pgd.robust_accuracy, auto.robust_accuracy))
                ),
                images=len(auto.sample_indices),
                warnings=tuple(auto.warnings),
                notes=tuple(deviations(content, DATA_SETS[content["data_set"]])),
                where=f"{content['device']}, {content['date']}",
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of run.py: {type(error).__name__} {error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found.append(run)
    return found


def page(runs: list[Run]) -> str:
    total = len(BACKBONES) * len(DATA_SETS) * len(METHODS)
    groups = _cells(runs)
    state = f"{len(groups)} of {total} cells were run." if groups else f"None of the {total} cells was run so far."
    remarks: dict[str, int] = {}
    parts = [INTRO.format(state=state)]
    for key, backbone in BACKBONES.items():
        published = PUBLISHED.get(key)
        parts.append(f"\n## {backbone.title}\n")
        if published is None:
            parts.append("Published figures not at hand.\n")
        rows = [
            "| data set | method | published SA / PGD-10 / AA | ours: SA | PGD-10 | AutoAttack | seeds | images |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, data_set in DATA_SETS.items():
            for method in METHODS.values():
                theirs = "" if published is None else " / ".join(f"{x:.2f}" for x in published[name][method.objective])
                own = _own(groups.get((name, key, method.objective), []), remarks)
                rows.append(f"| {data_set.title} | {method.title} | {theirs or '-'} | {' | '.join(own)} |")
        parts.append("\n".join(rows) + "\n")
    if remarks:
        parts.append("\n".join(["", *(f"[{number}] {text}  " for text, number in remarks.items())]) + "\n")
    return "\n".join(parts) + PROTOCOL


def _cells(runs: list[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """The runs of each cell: those of the paper's settings if there are any, else those that most seeds have alike."""
    cells: dict[tuple[str, str, str], dict[tuple, list[Run]]] = {}
    for run in runs:
        alike = cells.setdefault((run.data_set, run.backbone, run.method), {})
        alike.setdefault((run.notes, run.images), []).append(run)
    return {
        key: max(alike.values(), key=lambda group: (not group[0].notes, len(group), group[0].images))
        for key, alike in cells.items()
    }


def _own(runs: list[Run], remarks: dict[str, int]) -> list[str]:
    """The last five columns of a cell."""
    if not runs:
        return [NOT_RUN, NOT_RUN, NOT_RUN, "", ""]
    marks = "".join(f" [{remarks.setdefault(text, len(remarks) + 1)}]" for text in _remarks(runs))
    figures = []
    for values in zip(*(run.figures for run in runs), strict=True):
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        figures.append(f"{statistics.mean(values):.2f}{spread}")
    seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in runs))
    return [*figures[:2], figures[2] + marks, seeds, f"{runs[0].images:,}"]


def _remarks(runs: list[Run]) -> Iterator[str]:
    if runs[0].notes:
        yield f"Not the paper's settings: {'; '.join(runs[0].notes)}."
    yield from dict.fromkeys(warning for run in runs for warning in run.warnings)
    yield f"Run on {'; '.join(dict.fromkeys(run.where for run in runs))}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write (default: docs/reproduction.md)")
    args = parser.parse_args(argv)
    write_atomically(args.output, page(read_runs(args.runs)).encode())
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
