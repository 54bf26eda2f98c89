"""One call of the wrapped model for a whole training step.

Distributed wrappers synchronise gradients only for what runs inside *their* forward, once a step. The attack, both
routes and the loss therefore run as one method inside a single call of the wrapper (the same device as in TRL and
Lightning).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def call_inside(wrapper: nn.Module, model: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """`method(*args)`, run inside `wrapper(...)` when `wrapper` is not `model` itself."""
    if wrapper is model:
        return method(*args)
    forward = model.__dict__.get("forward")

    def restore() -> None:
        if forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = forward

    def redirected(*inner: Any) -> Any:
        restore()
        return method(*inner)

    model.forward = redirected
    try:
        return wrapper(*args)
    finally:
        restore()
