"""Progress bars with the time left, on a terminal and in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm


# Shorter work would only make a bar flicker.
_DELAY = 3.0
# In a file every state of a bar stays there: one a minute shows that something moves.
_IN_FILES = 60.0

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def redraw_seconds() -> float:
    """Time between two states of a bar: short where they replace each other, long where they all stay."""
    return 0.1 if sys.stderr.isatty() or "ipykernel" in sys.modules else _IN_FILES


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    title: str,
    unit: str,
    total: float | None = None,
    is_shown: bool = True,
    delay: float | None = None,
    **options: Any,
) -> tqdm:
    """A bar on standard error, in the main process, which goes when the work is done. TQDM_DISABLE=1 hides it.

    Args:
        items (`Iterable`, *optional*): What is worked on; the bar is an iterable of it.
        title (`str`): What is running.
        unit (`str`): What is counted.
        total (`float`, *optional*): How many there are, where `items` cannot say.
        is_shown (`bool`): Draw it.
        delay (`float`, *optional*): Seconds of work before it is drawn for the first time. `None`: a few.
        **options: Passed on to `tqdm`.
    """
    seconds = redraw_seconds()
    options = {"leave": False, **options}
    # Else the environment may say so: TQDM_DISABLE=1.
    if not is_shown or _hidden.get() or os.environ.get("RANK", "0") != "0":
        options["disable"] = True
    # tqdm has a watch that would draw a bar every 10 seconds.
    return tqdm(
        items,
        desc=title,
        unit=unit,
        total=total,
        delay=_DELAY if delay is None else delay,
        mininterval=seconds,
        maxinterval=max(10.0, seconds),
        **options,
    )


@contextmanager
def hidden_progress(is_hidden: bool = True) -> Iterator[None]:
    """No bars inside, if `is_hidden`."""
    token = _hidden.set(is_hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)
