"""What an initialiser is: something that runs once, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


class Initializer:
    """Changes nothing. Subclasses change the model, or ask for a stage of training before the one there is."""

    def __call__(self, model: AutoLoraModel) -> None:
        """Changes the model, in place."""

    def stage(self, epochs: float) -> dict[str, Any] | None:
        """The training arguments in which a stage of training before the main one differs from it; `None`: no stage.

        Args:
            epochs (`float`): Length of the main one.
        """
        return None
