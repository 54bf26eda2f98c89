"""Options that a user gives by name, for dataclasses that are chosen by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .checks import listed


T = TypeVar("T")


def with_options(kind: type[T], options: Mapping[str, Any] | None, where: str) -> T:
    """An instance of a dataclass (or of a class without options).

    Args:
        kind (`type`): The class.
        options (`Mapping`, *optional*): Its fields.
        where (`str`): What the options are called in messages.

    Raises:
        ValueError: If it has no such option, with those it has; or if a value is of the wrong kind.
    """
    known = {entry.name for entry in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    unknown = sorted(set(options or ()) - known)
    if unknown:
        has = f"Its options are {listed(sorted(known))}" if known else "It has no options"
        raise ValueError(f"`{where}` has {listed(unknown)}, which {kind.__name__} does not know. {has}.")
    hints = get_type_hints(kind)
    for name, value in (options or {}).items():
        if not _fits(value, hints[name]):
            raise ValueError(f"`{where}`: `{name}` must be {_words(hints[name])}, got {value!r}.")
    return kind(**(options or {}))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that may come from JSON is of the kind that a field is annotated with."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is list:
        return f"a list, each of it {_words(arguments[0])}"
    words = {float: "a number", int: "an integer", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, str(hint))


def json_object(value: dict | str | None, where: str) -> dict | None:
    """`value` itself, or what it says in JSON.

    Raises:
        ValueError: If it is neither an object nor JSON of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"`{where}` must be a JSON object such as '{{\"beta\": 6}}', got {value!r}: {error}."
            ) from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{where}` must be an object such as {{'beta': 6}}, got {value!r}.")
    return value
