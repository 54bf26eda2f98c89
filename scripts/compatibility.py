"""Tests the package in a fresh environment of locked versions of the libraries it works with.

    python scripts/compatibility.py lowest            # the lowest versions that pyproject.toml allows
    python scripts/compatibility.py newest            # the newest ones when the lock was made
    python scripts/compatibility.py newest --lock     # resolves them anew, with uv, into requirements/newest.txt
    python scripts/compatibility.py lowest --environment DIR -- -x -k saving

An environment takes about 6 GB, most of it CUDA, and is removed at the end unless --environment names a folder for it,
which is used again. The package is installed without its dependencies, as a wheel, and the tests see it, not the
checkout. What follows `--` is given to pytest. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
LOCKS = {"lowest": "lowest-direct", "newest": "highest"}
# The platform that the locks are for: full locks hold the CUDA libraries of one.
PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
# What meets other libraries: PEFT's layers and files, timm's and transformers' networks, the hooks of `Trainer`, the
# Hub's clients, AutoAttack, readers of data, and the whole journey.
TESTS = (
    "tests/test_compatibility.py",
    "tests/test_golden.py",
    "tests/test_layers.py",
    "tests/test_branch_layers.py",
    "tests/test_arguments.py",
    "tests/test_backbones.py",
    "tests/test_towers.py",
    "tests/test_saving.py",
    "tests/test_trainer.py",
    "tests/test_checkpointing.py",
    "tests/test_stream.py",
    "tests/test_model_card.py",
    "tests/test_cli.py",
    "tests/test_quickstart.py",
    "tests/evaluation/test_evaluation_autoattack.py",
    "tests/evaluation/test_evaluation_robustness.py",
    "tests/integration/test_hub_journeys.py",
)
# The libraries whose versions are told.
SHOWN = ("torch", "timm", "transformers", "peft", "accelerate", "huggingface-hub", "datasets", "numpy", "pillow")


def lock_file(name: str) -> Path:
    return ROOT / "requirements" / f"{name}.txt"


def lock(name: str) -> None:
    """Writes the lock anew; packages are looked for where uv is set up to look, of which nothing is written down."""
    if importlib.util.find_spec("uv") is None:
        raise SystemExit("--lock resolves versions with uv: pip install uv")
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "requirements/tests.in", "--upgrade"]
    command += ["--resolution", LOCKS[name], *PLATFORM, "--no-annotate", "--quiet"]
    command += ["--custom-compile-command", f"python scripts/compatibility.py {name} --lock"]
    subprocess.run([*command, "--output-file", str(lock_file(name).relative_to(ROOT))], cwd=ROOT, check=True)


def install(name: str, environment: Path) -> Path:
    """Makes the environment, or brings it up to date; returns its folder of commands."""
    if not (environment / "pyvenv.cfg").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    commands = environment / ("Scripts" if os.name == "nt" else "bin")
    python, source = str(commands / "python"), environment / "source"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(lock_file(name))], check=True)
    # Of a copy: setuptools leaves a folder `build` beside what it builds, which gets into the next wheel.
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for entry in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / entry, source)
    shutil.copytree(ROOT / "autolora_hf", source / "autolora_hf", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([python, "-m", "pip", "install", *options, str(source)], check=True)
    shutil.rmtree(source)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    return commands


def test(commands: Path, arguments: list[str]) -> int:
    versions = f"from importlib.metadata import version\nfor name in {SHOWN}: print(f'{{name}} {{version(name)}}')"
    subprocess.run([str(commands / "python"), "-c", versions], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Not `python -m pytest`, which would put the checkout before the installed package.
    return subprocess.run([str(commands / "pytest"), "-q", *arguments, *TESTS], cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(LOCKS))
    parser.add_argument("--lock", action="store_true", help="write the lock anew instead of testing")
    parser.add_argument("--environment", type=Path, help="folder of the environment, which is kept")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    if args.lock:
        lock(args.name)
        return 0
    if args.environment is not None:
        return test(install(args.name, args.environment.resolve()), args.arguments)
    with tempfile.TemporaryDirectory() as folder:
        return test(install(args.name, Path(folder) / args.name), args.arguments)


if __name__ == "__main__":
    sys.exit(main())
