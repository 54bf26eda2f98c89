"""Training runs that are killed at random moments end as if nothing had happened."""

import json
import os
import re
import subprocess
import sys

import pytest
from script_modules import SCRIPTS, load


KILLS = 5

matrix = load("kill_matrix")


@pytest.mark.slow
@pytest.mark.parametrize("name", [setup.name for setup in matrix.SETUPS])
def test_killed_runs_end_with_the_same_bits(tmp_path, name):
    """30 kills in all. In a process of its own, since it forks."""
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        str(SCRIPTS / "kill_matrix.py"),
        "--kills",
        str(KILLS),
        "--only",
        name,
        "--output",
        str(report),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(report.read_text())["rows"]
    assert row["kills"] == KILLS and row["runs_equal"] == row["runs"] > 0


PAGE = SCRIPTS.parent / "docs" / "reliability.md"


def test_the_page_has_what_was_measured():
    """The tables of docs/reliability.md are written by hand, of files that the scripts write."""
    rows = re.findall(
        r"^\| (.+) \| (\d+) \| (\d+) \((\d+), (\d+), (\d+)\) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M
    )
    report = json.loads((PAGE.parent / "kill_matrix.json").read_text())
    measured = [
        (
            row["processes"],
            row["kills"],
            *(row["kinds"][kind] for kind in ("time", "file", "call")),
            row["runs"],
            row["runs_equal"],
        )
        for row in report["rows"]
    ]
    assert [tuple(map(int, numbers)) for _, *numbers in rows] == measured
    assert [name for name, *_ in rows] == [row["setup"] for row in report["rows"]]
    totals = re.search(r"^\| all \| +\| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M)
    sums = [sum(row[key] for row in report["rows"]) for key in ("kills", "runs", "runs_equal")]
    assert list(map(int, totals.groups())) == sums and not any(row["problems"] for row in report["rows"])


@pytest.mark.parametrize("name", ["soak_before", "soak"])
def test_the_page_has_what_the_soak_measured(name):
    found = re.search(
        rf"^\|.*\(`{name}\.json`\) \| (\d+) \| (\d+), (\d+) \| ([\d,]+) to ([\d,]+) MiB.* \| (\d+), (\d+) \|$",
        PAGE.read_text(),
        re.M,
    )
    report = json.loads((PAGE.parent / f"{name}.json").read_text())
    summary, rows = report["summary"], report["rows"]
    later = [row["resident_mib"] for row in rows[len(rows) // 10 :]]
    files = [row["open_files"] for row in rows]
    expected = [
        round(summary["minutes"]),
        summary["epochs"],
        summary["steps"],
        min(later),
        max(later),
        files[0],
        files[-1],
    ]
    assert [int(number.replace(",", "")) for number in found.groups()] == [round(value) for value in expected]


def test_a_difference_is_noticed():
    """One value anywhere in what a run ends with is enough."""
    result = {"weights": "ab", "history": [{"loss": 0.5}], "checkpoints": {"checkpoint-3/model.safetensors": "cd"}}
    assert matrix.differences([result], [json.loads(json.dumps(result))]) == []
    changed = json.loads(json.dumps(result))
    changed["history"][0]["loss"] = 0.5 + 2**-53
    assert matrix.differences([result], [changed]) == ["/0/history/0/loss: 0.5 is not 0.5000000000000001"]
    del changed["checkpoints"]["checkpoint-3/model.safetensors"]
    assert len(matrix.differences([result], [changed])) == 2
    assert matrix.differences([result], [result, result])
