"""Checks the package on every architecture family of timm and every image classifier of transformers.

Each row of `coverage_rows.json` is one architecture with random weights: the cheapest instance of each module that
registers models with timm, a narrow configuration of each class that `AutoModelForImageClassification` of transformers
knows, and some unusual variants. What is checked is in `architecture_checks.py`; stock PEFT is asked the same next to
it. Every row runs in a process of its own, with limits on time and memory, and leaves one JSON file, so that a sweep
that was stopped goes on where it was. At the end the table `docs/coverage.md` is written.

    python scripts/architecture_coverage.py                         # everything, about half an hour on two cores
    python scripts/architecture_coverage.py --only timm/resnet vit  # some rows, by name or family, without the table
    python scripts/architecture_coverage.py --choose                # measures timm's instances anew, rewrites the rows
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from dataclasses import asdict
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import timm
import torch
from architecture_checks import (
    BATCH,
    CHECKS,
    NUM_CLASSES,
    ROWS,
    TABLE,
    Row,
    check_row,
    failures,
    logits_of,
    message_of,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

import autolora_hf
from autolora_hf.files import write_atomically, write_json


__all__ = ["ROWS", "Row", "check_row", "failures", "main"]

REPOSITORY = Path(__file__).parents[1]
DOCUMENT = REPOSITORY / "docs" / "coverage.md"
LIBRARIES = ("torch", "timm", "transformers", "peft")
# What the totals count: rows, verdicts, and what stock PEFT passes with two choices of layers.
FIGURES = ("rows", "PASS", "REFUSED", "FAIL", "-", "all", "all-linear")
# Columns of the table: the checks of both modes, then the one that exists in mode `adapter` only.
COLUMNS = (*CHECKS, "stock_loading")


# ---- one row in a process of its own ----


def versions() -> dict[str, str]:
    return {"autolora_hf": autolora_hf.__version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def source_digest() -> str:
    """Identity of the package and the checks: a result of other code is out of date."""
    digest = hashlib.sha256()
    files = [*Path(autolora_hf.__file__).parent.rglob("*.py"), Path(__file__).with_name("architecture_checks.py")]
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def key_of(row: Row, code: str) -> str:
    """Identity of a result: equal keys mean that the row need not run again."""
    text = json.dumps([asdict(row), versions(), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_row(name: str, file: Path, key: str, memory: float) -> None:
    """Checks one row and writes the result; runs in the child process."""
    torch.set_num_threads(1)
    # Of a model that wants more than this an allocation fails, which is one row's failure and no one else's.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    # The checks print nothing, but libraries show progress bars.
    sys.stdout = sys.stderr = open(os.devnull, "w")
    start = time.perf_counter()
    try:
        result = check_row(ROWS[name])
    except Exception as error:
        result = crashed(ROWS[name], message_of(error))
    result |= {"key": key, "total_seconds": round(time.perf_counter() - start, 1), "peak_mib": peak_mib()}
    write_json(result, file)


def peak_mib() -> int:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def crashed(row: Row, why: str) -> dict[str, Any]:
    """The result of a row whose checks did not come to an end."""
    failed = {"checks": {"sweep": {"process": f"FAIL: {why}"}}, "stock": {}, "notes": [], "seconds": {}}
    return {"row": json.loads(json.dumps(asdict(row))), **failed}


# ---- the sweep ----


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '--')}.json"


def sweep(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs what is not there yet, `args.workers` rows at a time, and returns the results by name."""
    context = multiprocessing.get_context("forkserver")
    # The libraries take longer to import than most rows to check: children are forked from a process that has them.
    context.set_forkserver_preload(["architecture_checks"])
    code, results, waiting = source_digest(), {}, []
    for name in names:
        file = file_of(args.out, name)
        stored = {} if args.fresh else stored_result(file)
        if stored.get("key") == key_of(ROWS[name], code):
            results[name] = stored
        else:
            waiting.append(name)
    print(f"{len(waiting)} rows to check, {len(results)} already there", flush=True)
    running: dict[str, tuple[BaseProcess, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                name = waiting.pop(0)
                running[name] = start(context, name, key_of(ROWS[name], code), args), time.monotonic()
            multiprocessing.connection.wait([process.sentinel for process, _ in running.values()], timeout=1)
            for name, (process, began) in list(running.items()):
                took = time.monotonic() - began
                if process.is_alive() and took < args.time_limit:
                    continue
                results[name] = finish(process, name, took, key_of(ROWS[name], code), args)
                del running[name]
                print(line(name, results[name]), flush=True)
    finally:
        for process, _ in running.values():
            process.kill()
    return {name: results[name] for name in names}


def stored_result(file: Path) -> dict[str, Any]:
    """What an earlier sweep left; nothing if the file is not there or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def start(context: ForkServerContext, name: str, key: str, args: argparse.Namespace) -> BaseProcess:
    file = file_of(args.out, name)
    file.unlink(missing_ok=True)
    process = context.Process(target=run_row, args=(name, file, key, args.memory))
    process.start()
    return process


def finish(process: BaseProcess, name: str, took: float, key: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a row whose process ended or ran out of time."""
    why = None
    if process.is_alive():
        process.kill()
        why = f"not finished after {args.time_limit:.0f} seconds"
    process.join()
    file = file_of(args.out, name)
    if file.exists():
        return json.loads(file.read_text())
    why = why or f"the process ended with exit code {process.exitcode}"
    result = crashed(ROWS[name], why) | {"key": key, "total_seconds": round(took, 1)}
    write_json(result, file)
    return result


# ---- verdicts ----


def verdict(result: dict[str, Any]) -> str:
    """`"PASS"`, `"FAIL"`, `"REFUSED"` or `"-"` (could not be built here)."""
    outcomes = [outcome for checks in result["checks"].values() for outcome in checks.values()]
    for kind in ("FAIL", "REFUSED"):
        if any(outcome.startswith(kind) for outcome in outcomes):
            return kind
    return "PASS" if "PASS" in outcomes else "-"


def stock_verdict(result: dict[str, Any], targets: str = "all") -> tuple[str, str]:
    """Whether stock PEFT passes, and why not."""
    outcome = result["stock"].get(targets, "-")
    kind, _, why = outcome.partition(": ")
    return kind, why


def line(name: str, result: dict[str, Any]) -> str:
    """One row for the terminal, and a line for each thing that is wrong with it."""
    row, parameters = result["row"], result.get("parameters", 0) / 1e6
    head = f"{verdict(result):8}{name:45}{row['model']:45}{parameters:7.2f}M {result['total_seconds']:6.1f} s"
    head += f" {result.get('peak_mib', 0):6} MiB   stock PEFT: {stock_verdict(result)[0]}"
    return "\n".join([head, *(f"          {failure}" for failure in failures(result))])


def counts(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows there are, and how many pass, by library; `"variants"` are rows beyond those."""
    totals: dict[str, dict[str, int]] = {}
    for result in results.values():
        row = result["row"]
        kind = "variants" if row["extra"] else row["library"]
        total = totals.setdefault(
            kind, dict.fromkeys(("rows", "PASS", "FAIL", "REFUSED", "-", "all", "all-linear"), 0)
        )
        total["rows"] += 1
        total[verdict(result)] += 1
        for targets in ("all", "all-linear"):
            total[targets] += stock_verdict(result, targets)[0] == "PASS"
    return totals


def passing_keys(results: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """How many keys of transformers' mapping pass with every class they stand for, and how many there are."""
    keys: dict[str, bool] = {}
    for result in results.values():
        row = result["row"]
        if row["library"] == "transformers" and not row["extra"]:
            keys[row["family"]] = keys.get(row["family"], True) and verdict(result) == "PASS"
    return sum(keys.values()), len(keys)


def totals_table(results: dict[str, dict[str, Any]]) -> str:
    titles = {"timm": "timm families", "transformers": "transformers classes", "variants": "unusual variants"}
    lines = [
        "| | rows | pass | refused | fail | not run | stock PEFT, all layers | stock PEFT, `all-linear` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, total in counts(results).items():
        lines.append(f"| {titles[kind]} | {' | '.join(str(total[figure]) for figure in FIGURES)} |")
    passing, keys = passing_keys(results)
    if keys:
        lines += ["", f"Of the {keys} keys of transformers' mapping, {passing} pass with every class they stand for."]
    return "\n".join(lines)


# ---- the document ----


def cell(result: dict[str, Any], check: str) -> str:
    """Outcome of one check in both modes."""
    modes = {mode: checks[check] for mode, checks in result["checks"].items() if check in checks}
    bad = [mode for mode, outcome in modes.items() if outcome.startswith("FAIL")]
    if bad:
        return "**fail**" if len(bad) == len(modes) else f"**fail** ({', '.join(bad)})"
    return "yes" if "PASS" in modes.values() else "-"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def instance(row: dict[str, Any]) -> str:
    """The model and, for timm, how it differs from the registered one."""
    changes = {key: value for key, value in row["kwargs"].items() if key != "img_size"}
    if row["library"] != "timm" or not changes:
        return f"`{row['model']}`"
    return f"`{row['model']}` ({', '.join(f'{key}={value}' for key, value in changes.items())})"


def branches(result: dict[str, Any]) -> str:
    count, share = result.get("branches", {}).get("full", (None, None))
    return "-" if count is None else f"{count} ({share:.0%})"


def table(results: list[dict[str, Any]]) -> list[str]:
    titles = ["family", "instance", "M parameters", "pixels", "branches", *(c.replace("_", " ") for c in COLUMNS)]
    titles += ["stock PEFT", "s", "MiB"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for result in results:
        row, (kind, why) = result["row"], stock_verdict(result)
        checks = [cell(result, check) for check in COLUMNS]
        if verdict(result) in ("REFUSED", "-"):
            checks[0] = "*refused*" if verdict(result) == "REFUSED" else "*not run*"
        cells = [
            row["family"] + (f", {row['variant']}" if row["variant"] else ""),
            instance(row),
            f"{result['parameters'] / 1e6:.2f}" if "parameters" in result else "-",
            "{} x {}".format(*row["image_size"]),
            branches(result),
            *checks,
            "yes" if kind == "PASS" else f"no: {why}" if why else "-",
            f"{result['total_seconds']:.0f}",
            str(result.get("peak_mib", "-")),
        ]
        lines.append(f"| {' | '.join(map(escaped, cells))} |")
    return lines


def document(results: dict[str, dict[str, Any]]) -> str:
    rows = list(results.values())
    seconds = sum(result["total_seconds"] for result in rows)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [
        "# Which architectures work",
        f"Measured {datetime.date.today()} with {found}, Python {platform.python_version()}, on the CPU, by",
        "<!-- not run: takes about an hour -->\n```bash\npython scripts/architecture_coverage.py\n```",
        f"({len(rows)} rows, {seconds / 60:.0f} core-minutes). One row is the cheapest instance of a family with "
        f"random weights and {NUM_CLASSES} classes; the rows are in `scripts/coverage_rows.json`, the checks in "
        "`scripts/architecture_checks.py`.",
        totals_table(results),
        'Each check is made in mode `full` and in mode `adapter` with `target_modules="all"`:',
        "- *start*: both routes give the bare model's logits, to 1e-4 of the largest one;\n"
        "- *attack*: PGD through a model in train mode changes no weight, statistic, flag, gradient or random state;\n"
        "- *follows*: after the weights have changed, attacks on the model and on its frozen copy see the new ones;\n"
        "- *step*: one step of `AutoLoraTrainer` (PGD with 2 steps) changes what it should and nothing else, after "
        "which the routes differ;\n"
        "- *gradients*: in each route every parameter that it trains has a gradient, and no other has one;\n"
        "- *saving*: a saved model comes back bit for bit, logits too;\n"
        "- *merging*: `merge_and_unload()` gives the robust route's logits, to 1e-4 (results that differ by more in "
        "float32 are compared again in float64, since some deep random networks magnify rounding errors);\n"
        "- *bfloat16*: both routes and the trainer run under bfloat16 autocast;\n"
        "- *stock loading*: an adapter on the default layers loads with stock `PeftModel.from_pretrained` and gives "
        'the same logits; "-" where a branch is on a layer that PEFT has no exact LoRA for.',
        'A bfloat16 check is "-" where the bare model fails too. "Branches" counts the layers with a branch in mode '
        "`full`, and their share of the weights of linear layers and convolutions besides the head. Other norm modes "
        "and layouts and activation checkpointing are not part of the sweep, but of the test suite.",
        "*Stock PEFT* is `get_peft_model(model, LoraConfig(r=8, target_modules=..., modules_to_save=[head]))` on "
        "every `nn.Linear` and `nn.Conv2d` but the head. It passes if the model can be made, starts with the same "
        "logits, gives every LoRA tensor a gradient and merges to the same logits (1e-4). It is given the right "
        "head.",
    ]
    plain = [result for result in rows if not result["row"]["extra"]]
    for title, chosen in (
        ("Families of timm", [r for r in plain if r["row"]["library"] == "timm"]),
        ("Image classifiers of transformers", [r for r in plain if r["row"]["library"] == "transformers"]),
        ("Unusual variants", [r for r in rows if r["row"]["extra"]]),
    ):
        if chosen:
            parts += [f"## {title}", "\n".join(table(chosen))]
    for title, kinds in (("Refused or not run", ("REFUSED", "-")), ("Failures", ("FAIL",))):
        lines = []
        for name, result in results.items():
            if verdict(result) in kinds:
                outcomes = [outcome for checks in result["checks"].values() for outcome in checks.values()]
                why = failures(result) if kinds == ("FAIL",) else [outcomes[0].partition(": ")[2]]
                lines += [f"- `{name}`: {escaped(reason)}" for reason in why]
        parts += [f"## {title}", "\n".join(lines) or "None."]
    notes = [f"- `{name}`: {escaped(note)}" for name, result in results.items() for note in result["notes"]]
    reasons = [f"- `{name}`: {ROWS[name].why}" for name in results if ROWS[name].why]
    parts += ["## Notes", "\n".join(notes + reasons) or "None."]
    return "\n\n".join(parts) + "\n"


# ---- choosing the instances of timm ----

SIZES = (64, 96, 128, 160, 192, 224, 256)
# Large models are cut to this depth where their constructor allows it: all blocks of such models are alike.
LARGE, DEPTH = 40_000_000, 4
# Seconds that copying, saving and loading of a million parameters take, next to passes through the model.
SECONDS_PER_MILLION = 0.02


def parameters_of(name: str) -> int:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=NUM_CLASSES)
    except (NotImplementedError, RuntimeError):  # the constructor computes with values, which the meta device lacks
        model = timm.create_model(name, num_classes=NUM_CLASSES)
    return sum(parameter.numel() for parameter in model.parameters())


def constructor_arguments(name: str, size: int, large: bool) -> dict[str, int]:
    """Arguments for images of `size` pixels that the constructor of a model accepts."""
    depth = {"depth": DEPTH} if large else {}
    for kwargs in ({"img_size": size, **depth}, {"img_size": size}, depth):
        try:
            with torch.device("meta"):
                timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
        except TypeError:
            continue
        except (NotImplementedError, RuntimeError):
            pass
        return kwargs
    return {}


def cost_of(name: str, size: int, kwargs: dict[str, int]) -> float:
    """Seconds of a training pass, and of copying the weights; raises if the model does not work at this size."""
    model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
    images, times = torch.rand(BATCH, 3, size, size), []
    for _ in range(2):
        start = time.perf_counter()
        logits_of(model.train()(images)).square().sum().backward()
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        if model.eval()(images).shape != (BATCH, NUM_CLASSES):
            raise ValueError("no classifier")
    return min(times) + SECONDS_PER_MILLION * sum(parameter.numel() for parameter in model.parameters()) / 1e6


def choose(family: str) -> dict[str, Any]:
    """The cheapest of the two smallest instances of a family of timm, at the smallest size that works, as a row."""
    # timm's own test models are no instances that anyone uses.
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    best, errors = None, []
    for parameters, name in sorted((parameters_of(name), name) for name in names)[:2]:
        native = max(timm.get_pretrained_cfg(name).input_size[1:])
        for size in [*(size for size in SIZES if size < native), *([native] if native <= max(SIZES) else [])]:
            kwargs = constructor_arguments(name, size, parameters > LARGE)
            try:
                cost = cost_of(name, size, kwargs)
            except Exception as error:
                errors.append(f"{name} at {size}: {message_of(error)}")
                continue
            if best is None or cost < best[0]:
                best = cost, {"model": name, "kwargs": kwargs, "image_size": [size, size]}
            break
    if best is None:
        raise RuntimeError(f"No instance of {family} works: {'; '.join(errors)}")
    return {"library": "timm", "family": family, **best[1]}


def choose_all() -> None:
    """Rewrites the rows of timm's families; other rows, and those that say why they were chosen, stay."""
    torch.set_num_threads(1)
    entries = json.loads(TABLE.read_text())
    kept = {e["family"]: e for e in entries if e["library"] == "timm" and e.get("why") and not e.get("extra")}
    rest = [entry for entry in entries if entry["library"] != "timm" or entry.get("extra")]
    chosen = []
    for family in timm.list_modules():
        chosen.append(kept.get(family) or choose(family))
        print(json.dumps(chosen[-1]), flush=True)
    text = ",\n".join(f"  {json.dumps(entry)}" for entry in chosen + rest)
    write_atomically(TABLE, f"[\n{text}\n]\n".encode())


def missing_rows() -> list[str]:
    """Families and classes that have no row."""
    found = {(row.library, row.family) for row in ROWS.values() if row.library == "timm" and not row.extra}
    found |= {(row.library, row.model) for row in ROWS.values() if row.library == "transformers" and not row.extra}
    wanted = [("timm", family) for family in timm.list_modules()]
    for classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        wanted += [("transformers", name) for name in ([classes] if isinstance(classes, str) else classes)]
    return [f"{library}/{name}" for library, name in wanted if (library, name) not in found]


# ---- command ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to check, by name or family")
    parser.add_argument("--library", choices=("timm", "transformers"), help="rows of one library")
    parser.add_argument("--out", type=Path, default=Path("coverage-results"), help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time, each on one thread")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for one row")
    parser.add_argument("--memory", type=float, default=6, help="GiB for one row")
    parser.add_argument("--fresh", action="store_true", help="check again what has been checked")
    parser.add_argument("--choose", action="store_true", help="choose the instances of timm anew, check nothing")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.choose:
        choose_all()
        return 0
    missing = missing_rows()
    if missing:
        print(f"No row for {', '.join(missing)}: add one to {TABLE.name}, or use --choose.", file=sys.stderr)
    names = [
        name
        for name, row in ROWS.items()
        if args.library in (None, row.library) and (args.only is None or {name, row.family} & set(args.only))
    ]
    unknown = set(args.only or ()) - set(names) - {ROWS[name].family for name in names}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    # Inherited by the children; a pool of threads for each of them would only be in the way.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    args.out.mkdir(parents=True, exist_ok=True)
    results = sweep(names, args)
    print(f"\n{totals_table(results)}")
    if len(names) == len(ROWS):
        DOCUMENT.parent.mkdir(exist_ok=True)
        write_atomically(DOCUMENT, document(results).encode())
        print(f"\nWrote {DOCUMENT.relative_to(REPOSITORY)}.")
    return 1 if missing or any(verdict(result) == "FAIL" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
