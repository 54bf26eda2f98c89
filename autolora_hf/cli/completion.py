"""`autolora --print-completion`: a script that completes commands, options, choices, files and folders in a shell.

Made from the parsers of the commands, so it has every option that they have with the installed versions. That takes as
long as importing torch, and is done once: the script, which shtab writes, needs neither this package nor Python. What
asks the program anew at every key, as argcomplete does, would import torch each time.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any, get_args


SHELLS = ("bash", "zsh", "fish")

# Arguments that name something on this machine; what is on the Hub cannot be completed.
FOLDERS = ("checkpoint_dir", "data", "folder", "output_dir", "space", "test_data", "train_data", "validation_data")
# The models may be folders too, which are completed with files.
FILES = (
    "base_model",
    "html",
    "model",
    "natural",
    "output",
    "resume_from_checkpoint",
    "source",
    "training_log",
    "transfer_from",
)


def completion_script(shell: str, commands: dict[str, str]) -> str:
    """The script.

    Raises:
        ModuleNotFoundError: If shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ModuleNotFoundError(
            f'Completion needs shtab: `pip install "autolora-hf[completion]"` ({error}).'
        ) from error
    return shtab.complete(_all_commands(commands, shtab.FILE, shtab.DIRECTORY), shell)


def _all_commands(commands: dict[str, str], file: Any, folder: Any) -> argparse.ArgumentParser:
    """One parser of all commands, for shtab; `file` and `folder` are how it completes them."""
    root = argparse.ArgumentParser(prog="autolora", description="Adversarially robust fine-tuning.")
    root.add_argument("--version", action="store_true", help="show the version")
    root.add_argument("--print-completion", choices=SHELLS, help="print a script for this shell")
    parsers = root.add_subparsers(dest="command")
    for name, what in commands.items():
        own = import_module(f".{name}", __package__).build_parser()
        choices = _train_choices() if name == "train" else {}
        for action in own._actions:
            # Of `--output_dir` and `--output-dir`, which are the same, one is enough.
            if any("-" in option.lstrip("-") for option in action.option_strings):
                action.option_strings = [option for option in action.option_strings if "_" not in option]
            # `--examples` is a folder of `demo` and a number of `evaluate`.
            if action.dest in FOLDERS or action.metavar == "DIR":
                action.complete = folder
            elif action.dest in FILES:
                action.complete = file
            elif action.dest in choices:
                action.choices = choices[action.dest]
        parsers.add_parser(name, help=what, parents=[own], add_help=False)
    return root


def _train_choices() -> dict[str, tuple[str, ...]]:
    """Options of `train` that take one of a few words, which the arguments themselves check."""
    from ..config import Norm
    from ..data import Augmentation
    from ..initializers import INITIALIZERS
    from ..layers import BRANCHES
    from ..objectives import OBJECTIVES
    from ..postprocessing import FINISHERS
    from ..schedules import SCHEDULES
    from ..training.averaging import AVERAGES

    return {
        "augmentation": get_args(Augmentation),
        "average_weights": tuple(AVERAGES),
        "branch": tuple(BRANCHES),
        "finish": tuple(FINISHERS),
        "init": tuple(INITIALIZERS),
        "mode": ("full", "adapter"),
        "objective": tuple(OBJECTIVES),
        "report_to": ("trackio", "tensorboard", "wandb", "none"),
        "schedule": tuple(SCHEDULES),
        "threat_norm": get_args(Norm),
    }
