"""The `autolora` command."""

from __future__ import annotations

import sys
from importlib import import_module


COMMANDS = {
    "quickstart": "robust fine-tuning of a shipped backbone on real digits, in minutes, without a network",
    "train": "robust fine-tuning of any supported checkpoint on your own images",
    "evaluate": "natural and robust accuracy of a saved model",
    "release": "a measured release of a model, or of a small adapter extracted from it, with its card",
    "demo": "a page in which visitors attack a saved model, on this machine or as a Space of the Hub",
    "push": "publish a release on the Hugging Face Hub",
    "verify": "measure again what the card of a published model claims",
    "convert": "a timm checkpoint of a robust checkpoint of the field (ACL, DynACL, MadryLab, RobustBench, ...)",
    "export": "an ONNX file or a plain checkpoint of a saved model",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 it failed or a check did not hold, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(f"autolora_hf {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"autolora: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    # Imported late: `autolora --help` should not wait for torch.
    command = import_module(f".{name}", __name__)
    try:
        status = command.run(rest)
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"autolora {name}: error: {error}", file=sys.stderr)
        return 1
    return status or 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: autolora COMMAND [options]",
            "",
            "Adversarially robust fine-tuning of timm and Hugging Face vision checkpoints.",
            "",
            "commands:",
            *lines,
            "",
            "`autolora COMMAND --help` explains a command and its options.",
        ]
    )
