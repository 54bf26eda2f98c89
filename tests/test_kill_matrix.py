"""Training runs that are killed at random moments end as if nothing had happened."""

import json
import os
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
