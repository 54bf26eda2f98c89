"""A griffe extension that reads the docstrings of this package: Hugging Face types, and references to names.

    name (`str`, *optional*): What it is, see [`evaluate_robustness`].

becomes `name (str, optional): What it is, see [evaluate_robustness](link)`. Nothing is imported, so the site is built
without torch.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe


PAGES = Path(__file__).parents[2] / "docs" / "api"
REFERENCE = re.compile(r"\[`(~?)([A-Za-z_][\w.]*)`\](?![\[(])")
# Sections whose entries start with a name and its type.
_TYPED = re.compile(r"^(Args|Attributes):$")
_RETURNS = re.compile(r"^(Returns|Yields):$")
_ENTRY = re.compile(r"^(\**\w+ ?(?:\(.*?\)(?=[,:]))?(?:, \**\w+ ?(?:\(.*?\)(?=[,:]))?)*): ?(.*)$")
_NAME = re.compile(r"(\**\w+)(?: \((.*?)\)(?=,|$))?")


def plain_type(words: str) -> str:
    """A type in the notation of Hugging Face as one of Python, or as words where it says more than a type does."""
    return words.replace("`", "").replace("*optional*", "optional").strip()


def plain_entries(line: str) -> list[str]:
    """The entries of an `Args` section that one line stands for: names that share a description get one each."""
    match = _ENTRY.match(line)
    if match is None:
        return [line]
    entries = []
    for name, kind in _NAME.findall(match[1]):
        kind = "" if plain_type(kind) == "optional" else plain_type(kind)
        entries.append(f"{name} ({kind}): {match[2]}" if kind else f"{name}: {match[2]}")
    return entries


def plain_sections(text: str) -> str:
    """A docstring whose typed sections are as griffe's parser of Google's style expects them."""
    lines, kept, section, indent = text.split("\n"), [], None, 0
    position = 0
    while position < len(lines):
        line = lines[position]
        position += 1
        stripped = line.strip()
        if _TYPED.match(stripped) or _RETURNS.match(stripped):
            section, indent = stripped, len(line) - len(line.lstrip()) + 4
        elif stripped and section and len(line) - len(line.lstrip()) < indent:
            section = None
        elif section and len(line) - len(line.lstrip()) == indent:
            if _RETURNS.match(section):
                kind, colon, rest = stripped.partition(": ")
                line = " " * indent + (plain_type(kind) if colon else kind) + colon + rest
            else:
                # The lines that go on with the description belong to each of the names.
                more = []
                while position < len(lines) and (
                    not lines[position].strip() or len(lines[position]) - len(lines[position].lstrip()) > indent
                ):
                    more.append(lines[position])
                    position += 1
                for entry in plain_entries(stripped):
                    kept += [" " * indent + entry, *more]
                continue
        kept.append(line)
    return "\n".join(kept)


class Names:
    """Every name of a package, for references from its docstrings."""

    def __init__(self, package: griffe.Module) -> None:
        self.package = package
        self.by_tail: dict[str, list[str]] = defaultdict(list)
        for item in everything(package):
            parts = item.path.split(".")
            for start in range(1, len(parts)):
                self.by_tail[".".join(parts[start:])].append(item.path)
        self.shown = {defined_at(name, package) for name in shown_names()}

    def find(self, name: str, source: griffe.Object) -> str | None:
        """The path of what a docstring of `source` calls `name`: the nearest one, or the only one there is."""
        found = self.by_tail.get(name) or self._inherited(name)
        scope: griffe.Object | None = source
        while scope is not None:
            near = f"{scope.path}.{name}"
            if near in found:
                return near
            scope = scope.parent if isinstance(scope.parent, griffe.Object) else None
        shown = [path for path in found if self.is_shown(path)]
        for candidates in (shown, found):
            if len(candidates) == 1:
                return candidates[0]
        # Of several the one in the same sub-package, then the one that is nested least.
        own = ".".join(source.path.split(".")[:2])
        nearest = [path for path in found if path.startswith(f"{own}.")]
        if len(nearest) == 1:
            return nearest[0]
        shallow = [path for path in found if path.count(".") == min(other.count(".") for other in found)]
        return shallow[0] if len(shallow) == 1 else None

    def _inherited(self, name: str) -> list[str]:
        """Paths of what a class has from a base class in the package."""
        owner, _, member = name.rpartition(".")
        found = []
        for path in self.by_tail.get(owner, []) if owner else []:
            for base in getattr(self.package[path.partition(".")[2]], "bases", []):
                found += self.by_tail.get(f"{str(base).rpartition('.')[2]}.{member}", [])
        return found

    def is_shown(self, path: str) -> bool:
        """Whether the site shows it: named by a page, or a part of what is."""
        parts = path.split(".")
        if any(part.startswith("_") for part in parts):
            return False
        return any(".".join(parts[:end]) in self.shown for end in range(2, len(parts) + 1))


def shown_names() -> list[str]:
    """What the pages of the reference show, in their order."""
    return [name for page in sorted(PAGES.glob("*.md")) for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]


def defined_at(path: str, package: griffe.Module) -> str:
    """Where a name is defined that may be imported from elsewhere.

    Raises:
        KeyError: If there is no such name.
    """
    item = package[path.partition(".")[2]]
    while item.is_alias:
        path = item.target_path
        item = package[path.partition(".")[2]]
    return path


def everything(item: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it; what it imports is left out."""
    yield item
    for member in list(item.members.values()):
        if not member.is_alias:
            yield from everything(member)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded.

    Attributes:
        unresolved (`list[tuple[str, str]]`): Where a name stands that is none of the package's, and the name.
        references (`int`): How many there were.
    """

    def __init__(self) -> None:
        self.unresolved: list[tuple[str, str]] = []
        self.references = 0

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        names = Names(pkg)
        for item in everything(pkg):
            if item.is_attribute:
                _help_as_docstring(item, names)
            if item.docstring is not None:
                text = plain_sections(item.docstring.value)
                item.docstring.value = REFERENCE.sub(lambda match, item=item: self._link(match, item, names), text)

    def _link(self, match: re.Match[str], item: griffe.Object, names: Names) -> str:
        self.references += 1
        path = names.find(match[2], item)
        if path is None:
            self.unresolved.append((item.path, match[2]))
            return match[0]
        shown = match[2].rpartition(".")[2] if match[1] else match[2]
        if not names.is_shown(path):
            return f"`{shown}`"
        return f"[`{shown}`][{path}]"


def _help_as_docstring(item: griffe.Attribute, names: Names) -> None:
    """The `help` of a dataclass field is its docstring, and its default its value."""
    call = item.value
    if not isinstance(call, griffe.ExprCall) or str(call.function) not in ("field", "dataclasses.field"):
        return
    arguments = {argument.name: argument.value for argument in call.arguments if hasattr(argument, "name")}
    metadata = arguments.get("metadata")
    if item.docstring is None and isinstance(metadata, griffe.ExprDict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if str(key).strip("\"'") == "help":
                item.docstring = griffe.Docstring(_text_of(str(value), item, names), parent=item)
    if "default" in arguments:
        item.value = arguments["default"]


def _text_of(source: str, item: griffe.Object, names: Names) -> str:
    """What a string literal says. Nothing is run, so of an f-string only `{", ".join(NAMES)}` is filled in."""
    node = ast.parse(source, mode="eval").body
    if isinstance(node, ast.Constant):
        return str(node.value)
    words = []
    for part in node.values if isinstance(node, ast.JoinedStr) else []:
        if isinstance(part, ast.Constant):
            words.append(str(part.value))
        elif isinstance(part.value, ast.Call) and isinstance(part.value.args[0], ast.Name):
            words.append(", ".join(_members(part.value.args[0].id, item, names)))
    return "".join(words)


def _members(name: str, item: griffe.Object, names: Names) -> list[str]:
    """The strings that a constant of the package consists of: the keys of a dictionary, or the items of a tuple."""
    path = names.find(name, item)
    value = None if path is None else names.package[path.partition(".")[2]].value
    strings = value.keys if isinstance(value, griffe.ExprDict) else getattr(value, "elements", ())
    return [ast.literal_eval(str(string)) for string in strings]
