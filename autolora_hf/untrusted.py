"""Checkpoints from strangers: what their configurations may ask for, which files are read, how large a network may be.

Nothing here trusts a library to refuse by itself what it could read, download, execute or allocate.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checks import plain_json, shown, wrong
from .files import TensorInfo, read_header, read_json


logger = logging.getLogger(__name__)


# ---- configurations ----

# Arguments by which a configuration could make a library read files, download something or load code.
_REFUSED = re.compile(
    r"auto_map|quantization_config|.*attn_implementation.*|.*trust_remote_code.*|custom_pipelines|use_pretrained_"
    r"backbone|checkpoint.*|pretrained|pretrained_cfg_overlay|pretrained_strict|.*cache_dir|features_only|.*_file|"
    r".*experts_implementation.*|.*kernel_config.*|custom_load|transformers_weights"
)
_MOST_NUMBER, _LONGEST_SIDE = 200_000, 2048
# Images and windows whose size a library may square before it makes a layer.
_SIDE = re.compile(r".*(image|img|input|window)_size|.*resolution")
# Of the text half of models such as CLIP, which a classifier does not build.
_VOCABULARY = re.compile(r"vocab_size|.*_token_id")


def check_network(config: Any, where: str) -> None:
    """Raises `ValueError` if a library's configuration asks for more than to build a network.

    Args:
        config: Content of a `config.json` of timm or transformers; `None` if there is none.
        where (`str`): What to call it in messages.
    """
    if config is None:
        return
    if not isinstance(config, dict):
        raise wrong(where, "an object", config)
    plain_json(config, where)
    waiting = [(where, "", False, config)]
    while waiting:
        where, key, of_weights, entry = waiting.pop()
        if isinstance(entry, dict):
            for name, part in entry.items():
                # What timm notes about the weights, such as their file, plays no part without `pretrained`.
                if _REFUSED.fullmatch(name) and not of_weights and part not in (None, False, "", "eager", "sdpa"):
                    raise ValueError(
                        f"{where}.{name} is set, which is not needed to build a network and could load files or code."
                    )
                # Cut, since long names and many entries would be a long text for each entry.
                inner = f"{where[:100]}.{name[:100]}"
                waiting.append((inner, name, of_weights or name == "pretrained_cfg", part))
        elif isinstance(entry, list):
            waiting += [(where, key, of_weights, part) for part in entry]
        elif isinstance(entry, (int, float)) and not _VOCABULARY.fullmatch(key):
            if abs(entry) > (_LONGEST_SIDE if _SIDE.fullmatch(key) else _MOST_NUMBER):
                raise ValueError(f"{where} is {shown(entry)}, larger than anything that describes a network.")


def safe_config(folder: Path, name: str) -> dict[str, Any]:
    """Content of the `config.json` of a checkpoint, which may come from a stranger.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it asks for more than to build a network.
    """
    saved = read_json(folder / "config.json")
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / 'config.json'} holds no configuration.")
    # Custom code is named there; it is never loaded.
    named = {key: value for key, value in saved.items() if key not in ("auto_map", "custom_pipelines")}
    check_network(named, f"{name}: config.json: config")
    wrapped = saved.get("architecture") if saved.get("model_type") == "timm_wrapper" else None
    if wrapped is not None and not timm.is_model(wrapped):
        raise ValueError(f"{name}: config.json: {shown(wrapped)} is no model of timm.")
    if (folder / "adapter_config.json").exists():
        # transformers would load it as well, perhaps from a pickle.
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json) besides the model: merge it, or move it elsewhere."
        )
    return saved


def safe_weights(folder: Path, name: str, of_timm: bool) -> dict[str, TensorInfo]:
    """Headers of the safetensors files that a library will read for a checkpoint.

    Raises:
        ValueError: If it would read others, such as pickles; or if they are damaged.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return read_header(whole)
    if of_timm or not index.is_file():
        raise ValueError(
            f"{name} has no safetensors weights named model.safetensors. Pickled ones (.bin, .pth) are not loaded, "
            "since a pickle can run code. If you trust them, load them with the library that wrote them, and save "
            "them again: `save_pretrained` of transformers and `timm.models.save_for_hf(model, folder, "
            "safe_serialization=True)` write safetensors."
        )
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    shards = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
    wrong = [shard for shard in shards if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)]
    if not shards or wrong:
        raise ValueError(f"{index} must name safetensors files of its own folder, got {shown((wrong or [None])[0])}.")
    header: dict[str, TensorInfo] = {}
    for shard in shards:
        header |= read_header(folder / shard)
    return header


# ---- sizes ----


class OversizeError(ValueError):
    """A network is far larger than its file of weights."""


class _LargestTensor(TorchDispatchMode):
    """Within it no tensor may have more than `most` values, those included that an initialisation makes on the way."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.numel() > self.most:
                raise OversizeError(
                    f"the network needs a tensor of {tensor.numel():,} values, far more than its file of weights"
                )
        return output


@contextmanager
def bounded_size(header: dict[str, TensorInfo]) -> Iterator[None]:
    """Within it, no network can be built that is much larger than the tensors of a file's header.

    A record can ask for a million blocks; libraries would build them one by one until memory is full.

    Raises:
        OversizeError: When a network has more than twice as many parameters, or more than ten times as many layers, or
            tables that are not in the file and far larger than it.
    """
    counts = {"layers": 0, "values": 0, "values of tables": 0}
    in_file = sum(math.prod(info.shape) for info in header.values())
    most = {
        "layers": 10_000 + 10 * len(header),
        "values": 1_000_000 + 2 * in_file,
        "values of tables": 16_000_000 + 2 * in_file,
    }

    def count(kind: str, number: int) -> None:
        counts[kind] += number
        if counts[kind] > most[kind]:
            raise OversizeError(f"the network has more than {most[kind]:,} {kind}, far more than its file of weights")

    def count_values(kind: str, tensor: Tensor | None) -> None:
        count(kind, 0 if tensor is None else tensor.numel())

    hooks = [
        register_module_module_registration_hook(lambda module, name, child: count("layers", 1)),
        register_module_parameter_registration_hook(lambda module, name, tensor: count_values("values", tensor)),
        register_module_buffer_registration_hook(
            lambda module, name, tensor: count_values("values of tables", tensor)
        ),
    ]
    try:
        with _LargestTensor(most["values of tables"]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def check_size(header: dict[str, TensorInfo], build: Callable[[], Any], name: str) -> None:
    """Builds a network once to see whether it has the size of its weights, without memory where that works."""
    for device in ("meta", "cpu"):
        try:
            with bounded_size(header), torch.device(device):
                build()
            return
        except OversizeError as error:
            raise ValueError(f"{name} was not loaded: {error}.") from error
        except Exception as error:  # what is wrong besides is told by the real attempt
            logger.debug("%s cannot be built on %s: %s", name, device, error)
