"""Zero-shot classification: what the embeddings of an image tower are good for, as a model that can be attacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import AutoLoraModel
from ..routes import ROBUST
from ..towers import tower_of


# The factor that the released training code of FARE gives cosines, and about that of OpenAI's CLIP.
LOGIT_SCALE = 100.0


class ZeroShotClassifier(nn.Module):
    """Pixels in [0, 1], N x 3 x H x W, to logits N x K: scaled cosines of image and class embeddings (Radford et al.,
    ICML 2021). [`evaluate_robustness`] takes it, with data as for the tower.

    Predictions do not depend on the scale; losses of attacks do.

    Args:
        model (`AutoLoraModel`): Of an image tower. Its weights are shared, its deployed route is run.
        embeddings (`Tensor`): K x D, see [`class_embeddings`]; of the text half that the tower was trained with.
        scale (`float`): Factor of the cosines.

    Raises:
        ValueError: If the model is no image tower, or the embeddings are not K x D and finite.
    """

    embeddings: Tensor

    def __init__(self, model: AutoLoraModel, embeddings: Tensor, scale: float = LOGIT_SCALE) -> None:
        super().__init__()
        if not isinstance(model, AutoLoraModel) or tower_of(model) is None:
            raise ValueError(f"A zero-shot classifier is made of an image tower, got {type(model).__name__}.")
        if embeddings.ndim != 2 or len(embeddings) < 2 or embeddings.shape[1] != model.num_classes:
            raise ValueError(
                f"`embeddings` must be K x {model.num_classes}, one row for each of at least two classes, got "
                f"{tuple(embeddings.shape)}. Take them from the text half of the same image-text model."
            )
        if not embeddings.isfinite().all():
            raise ValueError("`embeddings` must be finite.")
        self.preprocessing, self.threat_model = model.preprocessing, model.threat_model
        self.scale = scale
        self.tower = model.pixel_space(ROBUST)
        reference = next(model.parameters())
        self.register_buffer("embeddings", F.normalize(embeddings.detach().to(reference.device, torch.float32), dim=1))

    def forward(self, pixels: Tensor) -> Tensor:
        found = F.normalize(self.tower(pixels).to(self.embeddings.dtype), dim=1)
        return self.scale * found @ self.embeddings.T


@torch.no_grad()
def class_embeddings(
    model: PreTrainedModel, tokenizer: Any, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> Tensor:
    """Embeddings of classes by their names, K x D, each of length 1.

    Of each class, the normalised embeddings of all templates are averaged (Radford et al., ICML 2021).

    Args:
        model (`PreTrainedModel`): A whole image-text model of transformers, such as `CLIPModel`.
        tokenizer: Its tokenizer.
        names (`Sequence[str]`): Names of the classes, in class order.
        templates (`Sequence[str]`): Prompts, with "{}" in the place of the name.

    Raises:
        ValueError: If there are no names or templates, or a template has no place for the name.
    """
    if isinstance(names, str) or isinstance(templates, str) or not names or not templates:
        raise ValueError(f"`names` and `templates` must be lists of texts, got {names!r} and {templates!r}.")
    without = [template for template in templates if "{}" not in template]
    if without:
        raise ValueError(f"The template {without[0]!r} has no '{{}}' in the place of the name.")
    length, device = cast(Any, model.config).text_config.max_position_embeddings, next(model.parameters()).device
    rows = []
    for name in names:
        texts = [template.replace("{}", name) for template in templates]
        # Always to the full length: SigLIP was trained so, and to CLIP what follows the end makes no difference.
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = cast(Any, model).get_text_features(**{key: tensor.to(device) for key, tensor in tokens.items()})
        found = found if isinstance(found, Tensor) else found.pooler_output
        rows.append(F.normalize(found.float(), dim=1).mean(0))
    return F.normalize(torch.stack(rows), dim=1)


def refuse_tower(model: nn.Module) -> None:
    """Raises `ValueError` if the outputs of a model are embeddings, of which there is no accuracy."""
    if tower_of(model) is not None:
        raise ValueError(
            f"A {type(model.get_base_model() if isinstance(model, AutoLoraModel) else model).__name__} gives "
            "embeddings, so it has no accuracy. Make a classifier of it, `autolora_hf.evaluation.ZeroShotClassifier("
            "model, class_embeddings(clip, tokenizer, names))`, and give that to `evaluate_robustness`."
        )
