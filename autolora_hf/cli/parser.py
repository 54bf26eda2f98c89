"""What the parsers of all commands have in common."""

from __future__ import annotations

import argparse
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
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise UsageError(message)
