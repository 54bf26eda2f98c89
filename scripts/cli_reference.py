"""Writes the reference of the command line, `docs/cli/`, from the parsers of the commands.

python scripts/cli_reference.py           # write
python scripts/cli_reference.py --check   # exit status 1 if a page is not what the parsers say
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from transformers import TrainingArguments

from autolora_hf.cli import COMMANDS


FOLDER = Path(__file__).parents[1] / "docs" / "cli"
WIDTH = 119


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    return import_module(f"autolora_hf.cli.{command}").build_parser()


def page(command: str) -> str:
    """The reference of one command, in Markdown."""
    parser = parser_of(command)
    needed = [action for action in parser._actions if action.required]
    usage = " ".join(["autolora", command, *map(_needed, needed), "[options]"])
    parts = [
        f"# autolora {command}",
        _paragraph(parser.description),
        f"<!-- not run: usage -->\n```text\n{usage}\n```",
    ]
    for title, actions in _sections(command, parser):
        parts += [f"## {title}", "\n".join(_entry(parser, action) for action in actions)]
    if command == "train":
        parts += ["## Options of TrainingArguments", _inherited(parser)]
    if parser.epilog:
        parts.append(_paragraph(parser.epilog))
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The list of the commands."""
    rows = [f"| [`autolora {command}`]({command}.md) | {what} |" for command, what in COMMANDS.items()]
    text = (
        "Made from the parsers of the commands by `python scripts/cli_reference.py`. `autolora COMMAND --help` says "
        "the same. The exit status is 0 when a command did what it was asked to, 1 when it failed or a check did not "
        "hold, and 2 when it was called wrongly."
    )
    return "\n".join(["# Command line", "", _paragraph(text), "", "| | |", "|---|---|", *rows]) + "\n"


def _sections(command: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    actions = [a for a in parser._actions if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)]
    if command != "train":
        for title, chosen in (
            ("Arguments", [a for a in actions if not a.option_strings]),
            ("Options", [a for a in actions if a.option_strings]),
        ):
            if chosen:
                yield title, chosen
        return
    module = import_module("autolora_hf.cli.train")
    own = module.AutoLoraTrainingArguments.__annotations__
    inherited = {entry.name for entry in fields(TrainingArguments)} - set(own)
    groups = {
        "The model": module.ModelArguments.__annotations__,
        "The data": module.DataArguments.__annotations__,
        "The method": module.MethodArguments.__annotations__,
        "Attack and training": own,
    }
    for title, names in groups.items():
        yield title, [a for a in actions if a.dest in names]
    known = {name for names in groups.values() for name in names} | inherited
    yield "Help", [a for a in actions if a.dest not in known]


def _inherited(parser: argparse.ArgumentParser) -> str:
    """Only their names: what they mean is for transformers to say, and changes with its releases."""
    own = import_module("autolora_hf.cli.train").AutoLoraTrainingArguments.__annotations__
    inherited = {entry.name for entry in fields(TrainingArguments)} - set(own)
    shown = [a for a in parser._actions if a.dest in inherited and a.help != argparse.SUPPRESS]
    names = ", ".join(f"`{_option(action)}`" for action in shown)
    return _paragraph(
        f"Every option of transformers' `TrainingArguments` works too, such as {names}. `autolora train --help-all` "
        "explains them. An option may be written with `_` instead of `-`."
    )


def _option(action: argparse.Action) -> str:
    """How an option is written: with dashes, where there are two spellings."""
    long = [option for option in action.option_strings if option.startswith("--")] or action.option_strings
    return next((option for option in long if "_" not in option), long[0])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    return {"?": f" [{name}]", "*": f" [{name} ...]", "+": f" {name} [{name} ...]"}.get(str(action.nargs), f" {name}")


def _needed(action: argparse.Action) -> str:
    return f"{_option(action)}{_value(action)}" if action.option_strings else action.dest.upper()


def _entry(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    name = f"{_option(action)}{_value(action)}" if action.option_strings else action.dest.upper()
    text = argparse.HelpFormatter(parser.prog)._expand_help(action)
    default = action.default
    told = "default" in text.lower() or default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0
    if not told:
        text += f" (default: `{default}`)"
    return _paragraph(f"`{name}`: {_safe(text)}", start="- ")


def _safe(text: str) -> str:
    """Help as Markdown: what stands outside of code is no markup, and pages that it names are linked."""
    pieces = re.split(r"(`[^`]*`)", text)
    text = "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", p) for p in pieces)
    return re.sub(r"\bdocs/(\w+\.md)", r"[docs/\1](../\1)", text)


def _paragraph(text: str, start: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def pages() -> dict[str, str]:
    """File name and text of every page."""
    return {"index.md": index(), **{f"{command}.md": page(command) for command in COMMANDS}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    check = parser.parse_args().check
    wanted = pages()
    there = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    if check:
        old = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
        if old:
            print(f"Out of date: {', '.join(old)}. Run `python scripts/cli_reference.py`.", file=sys.stderr)
        return 1 if old else 0
    FOLDER.mkdir(exist_ok=True)
    for name in there.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
