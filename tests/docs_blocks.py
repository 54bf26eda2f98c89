"""The code blocks of the documentation: what each is, and what can be said of it without running it.

The convention, for everyone who writes a page:

- `python` blocks of a page share one namespace and run in a folder of the page's own;
- `bash` blocks hold `autolora ...` commands, which run in that folder too, one after the other;
- a block that is not run has `<!-- not run: reason -->` on the line before it, whatever its language. The commands in
  it are still read: their options must exist, and so must the files and extras that they name.

Blocks are fenced: what is indented could not be marked. Another comment, `<!-- given: names -->`, stands at the top of
a page whose blocks start from something that the reader has already; `docs_world.GIVES` makes it.
"""

import argparse
import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from script_modules import load
from sybil import Document, Example, Region
from sybil.parsers.markdown import CodeBlockParser


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- not run: (\S.*?) -->\n[ \t]*\Z")
GIVEN = re.compile(r"^<!-- given: (.*?) -->$", re.MULTILINE)
# Languages whose blocks run.
RUN = ("python", "bash")
LAUNCHERS = ("torchrun", "accelerate")
# What a page may tell readers to install or call that is no part of this repository.
OTHER_TOOLS = ("git", "hf", "mkdocs", "cd", "source", "docker", "jq", "mkdir", "tensorboard", "trackio")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Args:
        page (`str`): Path of the page in the repository.
        line (`int`): Its line, from 1.
        language (`str`): What its fence says, `""` if nothing.
        source (`str`): Its content.
        reason (`str`, *optional*): Why it is not run; `None` if it is.
    """

    page: str
    line: int
    language: str
    source: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def runs(self) -> bool:
        return self.reason is None and self.language in RUN


class AllBlocks(CodeBlockParser):
    """Sybil's parser of fenced blocks, for those of every language."""

    language = "every"

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in self.lexers(document):
            region.parsed = block_of(document, region)
            region.evaluator = self._evaluator
            yield region


def block_of(document: Document, region: Region) -> Block:
    before = document.text[: region.start]
    marker = MARKER.search(before)
    page = Path(document.path).relative_to(ROOT).as_posix()
    language = region.lexemes["arguments"].split()[0] if region.lexemes["arguments"].strip() else ""
    reason = marker[1] if marker else None
    return Block(page, before.count("\n") + 1, language, region.lexemes["source"], reason)


def parse(page: Path, run: Callable[[Example], None] | None = None) -> Document:
    """A page whose examples are its [`Block`]s; `run` is called with those that are evaluated."""
    return Document.parse(str(page), AllBlocks(evaluator=run))


def blocks(page: Path) -> list[Block]:
    return [example.parsed for example in parse(page)]


def count_by_markdown(page: Path) -> tuple[int, int]:
    """Fenced and indented code blocks as a parser of Markdown sees them, a second opinion on [`blocks`]."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    kinds = [token.type for token in tokens]
    return kinds.count("fence"), kinds.count("code_block")


# ---- commands ----


def commands(source: str) -> list[list[str]]:
    """The commands of a block as words, without prompts, comments, and what a shell does with their output."""
    found = []
    for line in source.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in ("&&", "|", ";"):
                found.append(words)
                words = []
            elif word in (">", ">>", "<"):
                next(lexer)
                if words[-1:] in (["1"], ["2"]):
                    words.pop()
            else:
                words.append(word)
        found.append(words)
    return [words for words in found if words]


def autolora_arguments(words: list[str]) -> list[str] | None:
    """What follows `autolora` in a command line, also in one that starts it in several processes; else `None`."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["autolora"]:
        return words[1:]
    if words[:3] in (["python", "-m", "autolora_hf"], ["python3", "-m", "autolora_hf"]):
        return words[3:]
    if words[:1] and words[0] in LAUNCHERS:
        for at in range(1, len(words) - 1):
            if words[at : at + 2] == ["-m", "autolora_hf"]:
                return words[at + 2 :]
    return None


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a command line that is only read; `None` if nothing is."""
    arguments = autolora_arguments(words)
    if arguments is not None:
        return problem_of_autolora(arguments)
    if words[0] in LAUNCHERS:
        return None if _existing(words[1:]) else "starts nothing that is there"
    if words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        return problem_of_extras(words[words.index("install") + 1 :])
    if words[:3] == ["python", "-m", "pytest"]:
        return (
            None if all((ROOT / w.partition("::")[0]).exists() for w in words if w.startswith("tests")) else "no test"
        )
    if words[0] == "python":
        return problem_of_script(words[1:])
    return None if words[0] in OTHER_TOOLS else f"{words[0]!r} is no command that the documentation may name"


def problem_of_autolora(arguments: list[str]) -> str | None:
    """What the parser of a command says to its options. A `...` stands for those that it needs."""
    from autolora_hf.cli import COMMANDS
    from autolora_hf.cli.completion import SHELLS

    if not arguments or arguments[0].startswith("-"):
        whole = (["--help"], ["--version"], *(["--print-completion", shell] for shell in SHELLS))
        return None if arguments in whole else "no command"
    name, options = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return f"no command {name!r}"
    parser = parser_of(name)
    if "..." in options:
        options = [word for word in options if word != "..."]
        given = {word.partition("=")[0] for word in options}
        for action in parser._actions:
            if action.required and action.option_strings and not given & set(action.option_strings):
                options += [action.option_strings[-1], "x"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(options)
    except SystemExit as stop:
        return None if not stop.code else said.getvalue().strip().splitlines()[-1]
    return None


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return load("cli_reference").parser_of(command)


def problem_of_extras(words: list[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        match = re.fullmatch(r"(\.|autolora[-_]hf)\[(.*)\]", word)
        for extra in match[2].split(",") if match else []:
            if extra not in project["optional-dependencies"]:
                return f"no extra {extra!r}"
    return None


def problem_of_script(words: list[str]) -> str | None:
    """A script has to be there, and to have the options, in its own source or that of a script it imports."""
    script = ROOT / words[0]
    if not script.is_file():
        return f"no script {words[0]}"
    source = "\n".join(path.read_text() for path in script.parent.glob("*.py"))
    missing = [word for word in words[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
    return f"no option {', '.join(missing)}" if missing else None


def _existing(words: list[str]) -> bool:
    return any(word.endswith(".py") for word in words)
