"""Figures and names in the guides are those of the package and of the files of results that they quote."""

import ast
import inspect
import json
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest
from script_modules import load

from autolora_hf.evaluation import RobustnessReport
from autolora_hf.evaluation.gradient_masking import CHECKS
from autolora_hf.objectives import OBJECTIVES


# The module, which a function of the same name hides.
html_report = import_module("autolora_hf.evaluation.html_report")
DOCS = Path(__file__).parents[1] / "docs"
CARD = DOCS.parent / "model_cards" / "quickstart-digits"


def page(name):
    return (DOCS / "guides" / f"{name}.md").read_text()


def rows(text, head, after=""):
    """Cells of the table whose head begins so, the first one behind `after`."""
    table = text.partition(after)[2] if after else text
    lines = re.search(rf"^ *{re.escape(head)}.*?(?=\n\n)", table, re.M | re.S)[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines[2:]]


def test_the_diagnostics_are_all_explained():
    names = [name for name, _ in rows(page("what-robust-accuracy-means"), "| check |")]
    assert names == list(CHECKS)


def test_the_verdicts_of_a_report_page_are_all_explained():
    nodes = ast.walk(ast.parse(inspect.getsource(html_report)))
    made = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Verdict"]
    titles = {node.args[1].value for node in made}
    assert len(titles) == len(made) > 5
    assert {title for title, _ in rows(page("what-robust-accuracy-means"), "| verdict |")} == titles


def test_the_quoted_summary_is_that_of_the_shipped_report():
    record = json.loads((CARD / "autolora_config.json").read_text())
    (measured,) = [row for row in record["results"] if row["protocol"] == "autoattack"]
    report = RobustnessReport.from_dict({key: value for key, value in measured.items() if key != "weights_sha256"})
    quoted = re.search(r"^> (.*?)\n\n", page("what-robust-accuracy-means"), re.M | re.S)[1].replace("\n> ", " ")
    # The page of a report says "images as they are", and how many stands beside it.
    assert quoted.replace("of 150 images", f"of {report.natural.total:,} images") == html_report._summary(report)


# The names in the tables of results of what `--objective` alone makes.
SYSTEMS = {
    "natural": "natural fine-tuning",
    "slf": "SLF (head alone, clean)",
    "alf": "ALF (head alone, PGD-AT)",
    "pgd-at": "PGD-AT",
    "mart": "MART",
    "trades": "TRADES (vanilla RFT)",
    "twins-at": "TWINS-AT",
    "twins-trades": "TWINS-TRADES",
    "ar-at": "AR-AT",
    "autolora": "AutoLoRa",
}


def test_the_costs_of_objectives_are_those_of_the_results():
    results = {row[0]: row for row in rows((DOCS / "results.md").read_text(), "| system |", "## Clothes to digits")}
    quoted = rows(page("choose-a-method"), "| `--objective` |")
    assert len(quoted) == len(SYSTEMS)
    for objective, _, time, natural, autoattack, *_ in quoted:
        objective = objective.strip("`")
        assert objective in OBJECTIVES
        _, mean_natural, _, mean_autoattack, mean_time, *_ = results[SYSTEMS[objective]]
        assert [time, natural, autoattack] == [mean_time, mean_natural.split()[0], mean_autoattack], objective


def test_the_table_of_the_readme_is_that_of_the_results():
    results = {row[0]: row for row in rows((DOCS / "results.md").read_text(), "| system |", "## All tasks")}
    quoted = rows((DOCS.parent / "README.md").read_text(), "| | digits |")
    names = {"TRADES": "TRADES (vanilla RFT)", "LoRA-AT (an adapter)": "LoRA-AT"}
    assert len(quoted) > 5
    for name, *figures in quoted:
        assert figures == results[names.get(name, name)][1:], name


def test_every_figure_in_choosing_a_method_was_measured():
    """Those with a decimal or thousands: on a page of results, or a mean over the seeds of a point of the grid."""
    figure = r"(?<![\d.,])\d+\.\d+(?![\d.])|(?<![\d.,])\d{1,3},\d{3}\b"
    pages = [(DOCS / f"{name}.md").read_text() for name in ("results", "scalar_accuracy", "extraction")]
    measured = {one for text in pages for one in re.findall(figure, text)}
    seeds = defaultdict(list)
    for row in json.loads((DOCS / "sensitivity.json").read_text())["rows"]:
        seeds[row["system"]].append(row.get("natural"))
    measured |= {f"{100 * sum(found) / len(found):.1f}" for found in seeds.values() if None not in found}
    quoted = re.findall(figure, re.sub(r"```.*?```", "", page("choose-a-method"), flags=re.S))
    assert len(quoted) > 60
    assert not [one for one in quoted if one not in measured]


def test_the_table_of_never_robust_backbones_is_that_of_its_file():
    # In the order in which they import each other.
    needed = ["pretrain_quickstart_backbone", *(f"benchmark_{name}" for name in ("data", "systems", "tasks", "run"))]
    *_, never_robust = map(load, [*needed, "robust_start", "never_robust"])
    measured = json.loads(never_robust.FILE.read_text())["rows"]
    assert page("never-robust-backbones") == never_robust.with_table(page("never-robust-backbones"), measured)
    changed = [{**row, "natural": row["natural"] - 0.1} for row in measured]
    assert page("never-robust-backbones") != never_robust.with_table(page("never-robust-backbones"), changed)


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "guides").glob("*.md")))
def test_files_that_a_guide_links_to_are_there(name):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
        if not link.startswith("../api/"):
            assert (DOCS / "guides" / link).is_file(), link
