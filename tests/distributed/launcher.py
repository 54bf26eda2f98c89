"""Starts real processes that find each other, as `torchrun` does, and waits for them in bounded time."""

import os
import signal
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent.parent


def environment(**changes):
    """For processes of one thread each that import the test modules and look at no network."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "distributed"), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **fixed, **changes}


def torchrun(*command, processes=2, timeout=600, **env):
    """Runs a Python file with its arguments in `processes` processes; returns the `CompletedProcess`, output as text.

    All are killed after `timeout` seconds.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return run([*launcher, *map(str, command)], timeout, **env)


def run(command, timeout, **env):
    """Runs a command in a process group of its own, which is killed when time is up."""
    process = subprocess.Popen(
        command,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"Still running after {timeout} s: {command}\n{output[-4000:]}") from error
    return subprocess.CompletedProcess(command, process.returncode, output)
