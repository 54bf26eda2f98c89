"""Options that a user gives by name, for dataclasses that are chosen by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

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
    try:
        return kind(**(options or {}))
    except TypeError as error:
        raise ValueError(f"`{where}` does not fit {kind.__name__}: {error}.") from error


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
