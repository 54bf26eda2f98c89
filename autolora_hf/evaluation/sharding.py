"""The processes of `torchrun` or `accelerate launch` that evaluate together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist


T = TypeVar("T")

# All processes must arrive within the first; from then on a process may wait for as long as an attack takes elsewhere.
ARRIVAL, ATTACK = timedelta(minutes=30), timedelta(days=100)

# What an error of one process is raised as in the others, so that all of them can be handled alike.
_KINDS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    ModuleNotFoundError,
    ImportError,
    OSError,
    FloatingPointError,
    AssertionError,
)


@dataclass(frozen=True)
class Processes:
    """The processes that evaluate together. One process alone never waits.

    Args:
        rank (`int`): Number of this process, from 0.
        size (`int`): How many there are.
        group (`ProcessGroup`, *optional*): Connects them; works on CPU memory.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that talks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values that all processes pass, by rank. Every process has to call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size} lost another one, which was killed or ran out of memory: {error}"
            ) from error
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """The body succeeds in all processes or fails in all of them: nobody waits for a process that has failed.

        The body must not call [`gather`]. Every process has to enter it.

        Raises:
            Exception: In the process whose body failed its own error; in the others one of the same kind with the
                same message.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        failures = self.gather(None if own is None else (_kind(own), f"{type(own).__name__}: {own}"))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise failure[0](f"Process {rank} of {self.size} failed with {failure[1]}")

    def share(self, work: Callable[[int], T], tasks: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Does every task in one of the processes and yields (task, result) in all of them, in order.

        The processes do one task each and then exchange their results, so that an error of one ends the others after
        the task they are at.

        Raises:
            Exception: What `work` raises in any process, see [`together`].
        """
        for start in range(0, len(tasks), self.size):
            turn = tasks[start : start + self.size]
            mine = None
            with self.together():
                if self.rank < len(turn):
                    mine = work(turn[self.rank])
            yield from zip(turn, self.gather(mine), strict=False)


def all_processes() -> Processes:
    """All processes of the default process group of `torch.distributed`; this one alone if there is none.

    Raises:
        RuntimeError: If not every process gets here within half an hour.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Processes()
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        arrival, attack = _groups(dist.group.WORLD)
        dist.all_gather_object([None] * size, None, group=arrival)
    except RuntimeError as error:
        raise RuntimeError(
            f"Not all of the {size} processes take part in the evaluation. `evaluate_robustness` must be called in "
            f"every process, not only in the main one, within {ARRIVAL.total_seconds() / 60:g} minutes: {error}"
        ) from error
    return Processes(rank, size, attack)


@lru_cache(maxsize=1)
def _groups(world: Any) -> tuple[Any, Any]:
    """Two groups of the same processes: one with little patience, one with much.

    The group of the caller may give up after ten minutes, in which a batch need not be done. They are kept for the
    next evaluation: to close a group that others may still be connecting to would be an error in those.
    """
    return dist.new_group(backend="gloo", timeout=ARRIVAL), dist.new_group(backend="gloo", timeout=ATTACK)


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
