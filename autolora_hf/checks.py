"""Checks of JSON that may come from a stranger: functions of a value and the path of its field.

They raise `ValueError` that names the field, says what it must be, and shows what it is.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Callable
from typing import Any


_MOST_NODES = 500_000

Check = Callable[[Any, str], None]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value in a message: short, however large it is, and without the control sequences of a terminal."""
    return _SHORT.repr(value)


def printable(text: str, most: int = 400) -> str:
    """The start of a text of a stranger, without the control sequences of a terminal."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:most])
    return shown + ("..." if len(text) > most else "")


def listed(names: list[str], most: int = 8) -> str:
    """Some names in a message, the others counted."""
    some = ", ".join(printable(name) for name in names[:most]) or "none"
    return some if len(names) <= most else f"{some} and {len(names) - most} more"


def wrong(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where[:500]} must be {wanted}, got {shown(value)}.")


def text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > 4096:
        raise wrong(where, "a text of at most 4096 characters", value)
    # Names are printed on terminals, and half a surrogate pair cannot be printed at all.
    if not value.isprintable() and any(
        unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in value
    ):
        raise wrong(where, "a text without control characters", value)


def line(value: Any, where: str) -> None:
    text(value, where)
    if not value.isprintable():
        raise wrong(where, "one line of printable characters", value)


def revision(value: Any, where: str) -> None:
    # huggingface-hub makes a file name of it.
    if not isinstance(value, str) or not re.fullmatch(r"[^\s/\\]+(/[^\s/\\]+)*", value[:257]) or len(value) > 256:
        raise wrong(where, "a branch, tag or commit", value)
    line(value, where)
    if ".." in value:
        raise wrong(where, "a branch, tag or commit", value)


def layer_name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", value[:513]) or len(value) > 512:
        raise wrong(where, "the name of a layer, such as 'layer1.0.conv1'", value)


def boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise wrong(where, "true or false", value)


def integer(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(where, f"an integer between {low} and {high}", value)

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any, where: str) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # The comparison is false for NaN, and exact for integers that no float holds.
        if not is_number or not low <= value <= high:
            raise wrong(where, f"a number between {low:g} and {high:g}", value)

    return check


def one_of(*options: Any) -> Check:
    def check(value: Any, where: str) -> None:
        # 1 == True
        if not any(value is option or (isinstance(value, str) and value == option) for option in options):
            raise wrong(where, f"one of {', '.join(map(repr, options))}", value)

    return check


def either(*checks: Check) -> Check:
    def check(value: Any, where: str) -> None:
        problems = []
        for one in checks:
            try:
                return one(value, where)
            except ValueError as error:
                problems.append(error)
        raise problems[-1]

    return check


def optional(one: Check) -> Check:
    return lambda value, where: None if value is None else one(value, where)


def list_of(one: Check, most: int, least: int = 0) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = f"{least} to {most}" if least != most else str(least)
            raise wrong(where, f"a list of {size} entries", value)
        for index, entry in enumerate(value):
            one(entry, f"{where}[{index}]")

    return check


def mapping(key: Check, one: Check, most: int) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise wrong(where, f"an object of at most {most} entries", value)
        for name, entry in value.items():
            key(name, f"a key of {where}")
            one(entry, f"{where}.{name}")

    return check


def json_object(required: dict[str, Check], other: dict[str, Check] | None = None) -> Check:
    known = {**required, **(other or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise wrong(where or "the file", "an object", value)
        missing, unknown = sorted(required.keys() - value.keys()), sorted(value.keys() - known.keys())
        if missing or unknown:
            what = [f"lacks {', '.join(missing)}"] if missing else []
            what += [f"has the unknown {', '.join(map(shown, unknown[:5]))}"] if unknown else []
            raise ValueError(f"{where or 'the file'} {' and '.join(what)}.")
        for name, entry in value.items():
            known[name](entry, f"{where}.{name}" if where else name)

    return check


def plain_json(value: Any, where: str) -> None:
    """Bounded JSON: finite numbers, texts, and not more than a large configuration has of them."""
    waiting, nodes = [(value, 0)], 0
    while waiting:
        entry, depth = waiting.pop()
        nodes += 1
        if nodes > _MOST_NODES or depth > 20:
            raise ValueError(f"{where} is larger or deeper than any configuration is.")
        if isinstance(entry, dict):
            waiting += [(part, depth + 1) for pair in entry.items() for part in pair]
        elif isinstance(entry, list):
            waiting += [(part, depth + 1) for part in entry]
        elif isinstance(entry, str):
            text(entry, f"a text in {where}")
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            number(-(2.0**64), 2.0**64)(entry, f"a number in {where}")
