"""One process against two: how equal their trainings are, as a Markdown table.

Trains tiny real models for a few epochs, once in one process and once in two processes that share the batches (DDP
over gloo, float32, no augmentation), and compares. Takes a few minutes on two cores.

    python scripts/distributed_equality.py --output docs/distributed_equality.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers


TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from agreement import DECISIONS, LOSSES, METRICS, SCALARS, gap, parameters, series  # noqa: E402
from launcher import torchrun  # noqa: E402
from training_worker import SCENARIOS, train  # noqa: E402


COLUMNS = (
    "model",
    "mode",
    "training / validation images",
    "micro steps",
    "steps",
    "gradient of the first step",
    "change of the weights",
    "learning rates, halvings",
    "loss scalars",
    "accuracies",
    "losses",
)


def row(name: str, folder: Path) -> dict[str, str]:
    """Compares what both processes wrote into `folder` with one process that takes no micro steps."""
    scenario = SCENARIOS[name]
    one = train(scenario, folder / f"{name}-one", accumulation=1)
    pair = [torch.load(folder / name / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    losses = [abs(a - b) / abs(a) for two in pair for a, b in zip(_flat(one), _flat(two), strict=True)]
    changes = [
        gap(parameters(end, one["start"]), parameters(other, one["start"]))
        for two in pair
        for end, other in zip(one["ends"], two["ends"], strict=True)
    ]

    def equal(*keys: str) -> str:
        return "equal" if all(series(one, *keys) == series(two, *keys) for two in pair) else "differ"

    halvings = sum(series(one, "reload")[0])
    cells = (
        scenario.model,
        scenario.mode,
        f"{scenario.images} / {scenario.validation}",
        str(scenario.accumulation),
        str(one["plan"]["steps_per_epoch"] * scenario.epochs),
        f"{max(gap(one['gradients'], two['gradients']) for two in pair):.1e}",
        f"{max(changes):.1e}",
        equal(*DECISIONS) + (f" ({halvings} halvings)" if halvings else ""),
        equal(*SCALARS),
        equal(*METRICS),
        f"{max(losses):.1e}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _flat(result: dict) -> list[float]:
    return [value for values in series(result, *LOSSES) for value in values]


NOTE = f"""# One process and two

`python scripts/distributed_equality.py --output docs/distributed_equality.md`: each row is a training in two processes
(DDP over gloo, float32, no augmentation, global batch of 16) against the same training in one process without micro
steps. Gradient: largest difference, as a share of the largest gradient. Change of the weights: largest difference at
the end of any epoch, as a share of how far the weights have moved. Losses: largest relative difference of any logged
loss.
Models with BatchNorm (`resnet`) differ by definition: each process normalises with the statistics of its own images.

torch {torch.__version__}, transformers {transformers.__version__}.

"""


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(entry.values() for entry in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="Markdown file to write as well")
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), help="default: all")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = torchrun(TESTS / "distributed/training_worker.py", folder, *args.scenarios, timeout=1800)
        if result.returncode:
            raise SystemExit(result.stdout)
        rows = [row(name, Path(folder)) for name in args.scenarios]
    text = NOTE + table(rows)
    print(text)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
