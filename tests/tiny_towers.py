"""Tiny random image towers of transformers, a whole CLIP and a tokenizer for it, and pictures without labels."""

from functools import cache

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    MetaClip2VisionConfig,
    MetaClip2VisionModelWithProjection,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from autolora_hf import config_for, get_autolora_model


IMAGE_SIZE, WIDTH = 32, 12
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": 8}
WORDS = ("[UNK]", "[PAD]", "[EOS]", "a", "photo", "of", "cat", "dog", "car", "blurry")

TOWERS = {
    "clip": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=WIDTH)),
    "clip-pooled": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "metaclip": lambda: MetaClip2VisionModelWithProjection(MetaClip2VisionConfig(**VISION, projection_dim=WIDTH)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
}


def vary(model, seed=0):
    """Moves every weight: a new network gives all images nearly the same embedding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tower(kind="clip", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vary(TOWERS[kind](), seed)


def adapted(kind="clip", seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_autolora_model(tower(kind, seed), config_for("fare", **config))


def whole_clip(seed=0):
    """A CLIP with both halves, whose text half reads [`tokenizer`]."""
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 10, "projection_dim": WIDTH}
    text |= {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 2}
    vision = {**VISION, "projection_dim": WIDTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vary(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)), seed)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def save_with_processor(model, folder, mean=(0.4, 0.5, 0.6)):
    """A checkpoint as it is on the Hub: weights, configuration and image processor."""
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    CLIPImageProcessor(**size, image_mean=list(mean), image_std=[0.2, 0.25, 0.3]).save_pretrained(folder)
    return str(folder)


@cache
def pictures(count=60, seed=0):
    """Smooth random images, each of another pattern, without labels."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    images = [Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC) for pixels in coarse]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def pixels(count=6, seed=0):
    """Random images in [0, 1], N x 3 x H x W."""
    return torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
