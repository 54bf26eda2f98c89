"""The `autolora` command."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

from .parser import UsageError
from .result import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_MEASURED,
    WRONG_USAGE,
    CommandResult,
    NotMeasuredError,
    standard_output_aside,
)


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

# How to go on after Ctrl-C.
_GOING_ON = {
    "train": "Go on with the same command and --resume-from-checkpoint True: from the last whole checkpoint in the "
    "output folder, or from the beginning if there is none yet.",
    "evaluate": "With --checkpoint-dir FOLDER the same command, given again, goes on where it was; without it, it "
    "begins anew.",
    "push": "Give the same command again: nobody sees a part of a push, and what has arrived is not sent again.",
}
_BEGIN_ANEW = "Give the same command again to begin anew; no half-written file was left under the name of a whole one."


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0: done, and of a check: it holds. 1: it failed, or a check does not hold. 2: wrong usage. 3: a check could not be
    made. 130: interrupted with Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return DONE if argv else WRONG_USAGE
    if argv[0] == "--version":
        from .. import __version__

        print(f"autolora_hf {__version__}")
        return DONE
    if argv[0] == "--print-completion":
        return _print_completion(argv[1:])
    name, options = argv[0], [word for word in argv[1:] if not _asks_for_json(word)]
    asked_for_help = not {"-h", "--help", "--help-all"}.isdisjoint(options)
    if len(options) == len(argv) - 1 or asked_for_help:
        return _run(name, options).status
    with standard_output_aside():
        try:
            result = _run(name, options)
        except UsageError as stop:
            result = CommandResult({"error": stop.message}, WRONG_USAGE)
        except Exception as error:
            traceback.print_exc()
            result = CommandResult({"error": f"{type(error).__name__}: {error}"}, FAILED)
    # Of several processes one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(result.document(name))
    return result.status


def _run(name: str, options: list[str]) -> CommandResult:
    if name not in COMMANDS:
        print(f"autolora: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return CommandResult({"error": f"unknown command {name!r}"}, WRONG_USAGE)
    try:
        # Imported late: `autolora --help` should not wait for torch.
        return import_module(f".{name}", __name__).run(options)
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"autolora {name}: error: {error}", file=sys.stderr)
        return CommandResult({"error": str(error)}, NOT_MEASURED if isinstance(error, NotMeasuredError) else FAILED)
    except KeyboardInterrupt:
        advice = _GOING_ON.get(name, _BEGIN_ANEW)
        print(f"\nautolora {name}: interrupted. {advice}", file=sys.stderr)
        return CommandResult({"error": f"interrupted. {advice}"}, INTERRUPTED)


def _print_completion(options: list[str]) -> int:
    from .completion import SHELLS, completion_script

    if len(options) != 1 or options[0] not in SHELLS:
        print(f"autolora: --print-completion needs one of {', '.join(SHELLS)}", file=sys.stderr)
        return WRONG_USAGE
    try:
        print(completion_script(options[0], COMMANDS))
    except ModuleNotFoundError as error:
        print(f"autolora: error: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _asks_for_json(word: str) -> bool:
    # argparse understands the beginning of an option too.
    return len(word) > 2 and "--json".startswith(word)


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
            "`autolora COMMAND --help` explains a command and its options; any of them prints its result as JSON with",
            "--json. Exit status: 0 done or holds, 1 failed or does not hold, 2 wrong usage, 3 could not be measured.",
            "`autolora --print-completion bash` (or zsh, fish) prints a script that completes them in a shell.",
        ]
    )
