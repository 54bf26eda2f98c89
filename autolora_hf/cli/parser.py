"""What the parsers of all commands have in common."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn

from .result import WRONG_USAGE


class UsageError(SystemExit):
    """Ends the program as `argparse` does, and knows why.

    Args:
        message (`str`): What is wrong with the options.
    """

    def __init__(self, message: str) -> None:
        super().__init__(WRONG_USAGE)
        self.message = message


class CommandParser(argparse.ArgumentParser):
    """A parser with the options of every command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Taken away by `main`, which has to know of it before the options are read; here for the help.
        self.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print the result as one JSON document on standard output, and all else on standard error",
        )

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        near = [name for word in words.split() if unknown and word.startswith("--") for name in self._near(word)]
        if near:
            message += f". Did you mean {' or '.join(dict.fromkeys(near))}?"
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise UsageError(message)

    def _near(self, word: str) -> list[str]:
        """Up to three options that end with what `word` names, or else that are written much like it."""
        name = word.partition("=")[0].replace("_", "-")
        options = [action.option_strings for action in self._actions if action.help is not argparse.SUPPRESS]
        # One spelling of each: the training's options have another one with underscores.
        known = list(dict.fromkeys(option[-1].replace("_", "-") for option in options if option))
        ends = [option for option in known if option.endswith(name.removeprefix("-"))]
        return ends[:3] or difflib.get_close_matches(name, known)
