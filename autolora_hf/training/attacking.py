"""How a trainer attacks its model: which copy of it, in which precision, from which starts."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks import PGD, bf16_keeps_strength
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from ..routes import ROBUST
from .arguments import AutoLoraTrainingArguments
from .distributed import random_starts


logger = logging.getLogger(__name__)


class RouteAttacker:
    """Attacks the deployed route by way of a frozen copy: the same function, with less work in each pass.

    Args:
        model (`AutoLoraModel`): The model in training.
        args (`AutoLoraTrainingArguments`): Threat model, precision, and what the copy may do to be quick.
        mixed_precision (`str`): That of the update, as accelerate names it.

    Attributes:
        dtype (`torch.dtype`): Precision in which attacks search.
    """

    def __init__(self, model: AutoLoraModel, args: AutoLoraTrainingArguments, mixed_precision: str) -> None:
        self.model, self.args = model, args
        keeps_strength = bf16_keeps_strength(args.threat_model, model.preprocessing.image_size)
        in_bf16 = args.attack_bf16
        if in_bf16 is None:
            in_bf16 = mixed_precision == "bf16" and keeps_strength
        if in_bf16 and not keeps_strength:
            logger.warning(
                "`attack_bf16` makes attacks weaker where the threat model allows so little (%s): the robust accuracy "
                "that the schedule sees is too good.",
                args.threat_model,
            )
        self.dtype = torch.bfloat16 if in_bf16 else next(model.parameters()).dtype
        # Made at the first attack, when the model is where it will be trained.
        self.frozen: FrozenRoute | None = None

    def __call__(
        self,
        attack: PGD,
        pixels: Tensor,
        labels: Tensor,
        *key: int,
        first: int,
        reference: Tensor | None = None,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Adversarial images; see [`random_starts`] for `key` and `first`, [`PGD`] for `reference` and [`PGD.search`]
        for `losses`, which stays as it is where the attack is another one.

        Pixels are not checked again: the collator has done so where they still were in the memory of the host.
        """
        if self.frozen is None:
            self.frozen = FrozenRoute(
                self.model,
                ROBUST,
                fold_norms=self.args.attack_fold_norms,
                linear_patches=self.args.attack_linear_patches,
                channels_last=self.args.channels_last,
                dtype=self.dtype,
                compiled_batch=self.args.train_batch_size if self.args.attack_compile else None,
            )
        # The radius may be on its way to that of the threat model.
        threat_model = getattr(attack, "threat_model", self.args.threat_model)
        start = random_starts(pixels, threat_model, *key, first=first)
        # Another attack may do more in its call than to search.
        search = partial(attack.search, losses=losses) if type(attack) is PGD else attack
        options: dict[str, Any] = {} if reference is None else {"reference": reference}
        adversarial = search(self.frozen.refresh(), pixels, labels, start=start, **options)
        # The update needs the most memory, and no copy.
        self.frozen.release()
        return adversarial
