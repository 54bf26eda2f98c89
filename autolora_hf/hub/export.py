"""ONNX export: one file from pixels in [0, 1] to logits, checked against the model before it appears."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..attacks.pgd import attack_mode
from ..files import write_atomically
from ..frozen import FrozenRoute
from ..modeling import AutoLoraModel
from ..progress import progress_bar
from ..routes import ROBUST


_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")

# Protocol buffers, and so ONNX files without a second file of weights, end at 2 GiB. The graph needs some of it.
_LARGEST = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxExport:
    """What [`export_onnx`] wrote, and how well it agrees with the model.

    Args:
        path (`Path`): The file.
        opset (`int`): Version of the ONNX operators it uses.
        max_difference (`float`): Largest difference of a logit between onnxruntime and torch, relative to the largest
            logit (to 1 if all are smaller).
        images_checked (`int`): Number of images they were compared on.
        bytes (`int`): Size of the file.
    """

    path: Path
    opset: int
    max_difference: float
    images_checked: int
    bytes: int


def export_onnx(
    model: AutoLoraModel,
    path: str | os.PathLike[str],
    *,
    route: str = ROBUST,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> OnnxExport:
    """Writes one route as an ONNX file: `pixels`, float32 N x 3 x H x W in [0, 1], to `logits`, float32 N x K.

    Normalisation is inside, N is free, and the branches are merged, so that the graph is that of the plain backbone;
    kinds that cannot be merged stay in it.
    The file is in float32, whatever the precision of the model is. Its metadata hold, as JSON, `threat_model`,
    `image_size` (height and width), `class_names` (`null` if unknown) and `resize` (how images come to that size), and
    as text `route` and `autolora_hf_version`.

    The result is run in onnxruntime on batches of 1, 2 and 5 images and compared with the model, before anything is
    written: the file appears whole or not at all. The model stays as it is.

    Args:
        model (`AutoLoraModel`): On any device, in any mode.
        path (`str`): File to write; its folder is created if needed, an older file is replaced.
        route (`str`): `"robust"` (deployed) or `"natural"`.
        opset (`int`, *optional*): Version of the ONNX operators; what torch prefers when `None`.
        tolerance (`float`): Largest permitted difference of a logit, relative to the largest logit (to 1 if all are
            smaller).

    Raises:
        ModuleNotFoundError: If onnx, onnxscript or onnxruntime is missing.
        IsADirectoryError: If `path` is a folder.
        ValueError: If the weights are too large for one file, the architecture or the opset cannot be exported, or the
            result differs from the model by more than `tolerance`. Nothing is written then.
    """
    _require_packages()
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it, such as {path / 'model.onnx'}.")
    kind = type(model.get_base_model()).__name__
    live = _float32_copy(model)
    frozen = FrozenRoute(live, route, linear_patches=False).to(memory_format=torch.contiguous_format)
    size = sum(tensor.numel() * tensor.element_size() for tensor in frozen.state_dict().values())
    if size > _LARGEST:
        raise ValueError(
            f"The weights of this {kind} take {size / 2**30:.1f} GiB in float32, and an ONNX file can hold less than "
            "2 GiB. Export it as a checkpoint instead (`autolora export --format checkpoint`)."
        )
    with progress_bar(title="ONNX export", unit="part", total=3) as bar:
        program = _traced(frozen, kind, model.preprocessing.image_size, opset)
        bar.update()
        _forget_traces(program.model)
        program.model.metadata_props.update(_metadata(model, route))
        used = program.model.opset_imports[""]
        content = program.model_proto.SerializeToString()
        del program, frozen
        bar.update()
        difference, count = _compare(live.pixel_space(route), _runner(content, kind), live.preprocessing.image_size)
    # So written, since any comparison with NaN is false.
    if not difference <= tolerance:
        raise ValueError(
            f"The exported {kind} differs from the model: by {difference:.2g} relative to the largest logit, where "
            f"`tolerance={tolerance:g}` is permitted. Nothing was written. If it is rounding, which deep networks "
            "amplify, permit more."
        )
    write_atomically(path, content)
    return OnnxExport(path, used, difference, count, len(content))


def _require_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ModuleNotFoundError(
                f'ONNX export needs {", ".join(_PACKAGES)}: `pip install "autolora-hf[onnx]"` ({error}).'
            ) from error


def _float32_copy(model: AutoLoraModel) -> AutoLoraModel:
    """The same model in eval mode on the CPU, where float32 is float32: GPUs may multiply in less."""
    # Values that layers cache are dropped first: copying a tensor that has a gradient graph fails.
    with attack_mode(model):
        result = copy.deepcopy(model)
    # Training in mixed precision leaves a forward on the instance, which would round to half precision.
    vars(result).pop("forward", None)
    return result.cpu().float()


def _metadata(model: AutoLoraModel, route: str) -> dict[str, str]:
    preprocessing = model.preprocessing
    # Without mean and standard deviation: somebody might apply them once more.
    resize = {name: getattr(preprocessing, name) for name in ("interpolation", "crop_pct", "crop_mode")}
    values = {
        "threat_model": asdict(model.threat_model),
        "image_size": preprocessing.image_size,
        "class_names": model.label_names,
        "resize": resize,
    }
    texts = {"route": route, "autolora_hf_version": __version__}
    return {name: json.dumps(value) for name, value in values.items()} | texts


def _traced(network: nn.Module, kind: str, image_size: tuple[int, int], opset: int | None) -> Any:
    """`network` as a `torch.onnx.ONNXProgram`; `kind` is its name in messages."""
    # Two images: torch takes a dimension of 1 for a constant.
    example = torch.full((2, 3, *image_size), 0.5)
    try:
        with torch.no_grad(), _quiet():
            network(example)  # fills what layers cache, which is constant from here on
            program: Any = torch.onnx.export(
                network,
                (example,),
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of many kinds: of tracing, of missing operators, of the conversion to an older opset
        wanted = "ONNX" if opset is None else f"ONNX opset {opset}"
        raise ValueError(f"{kind} cannot be exported to {wanted}: {_cause(error)}") from error
    used = program.model.opset_imports[""]
    if opset not in (None, used):
        # The exporter keeps its own opset when it cannot convert, and only logs it.
        raise ValueError(
            f"{kind} cannot be exported to ONNX opset {opset}, only to opset {used} or a later one: leave out `opset`."
        )
    if isinstance(program.model.graph.inputs[0].shape[0], int):
        raise ValueError(
            f"{kind} cannot be exported to ONNX for any number of images: somewhere it computes with the number."
        )
    return program


def _forget_traces(graph_model: Any) -> None:
    """Drops the notes of the exporter, a stack trace with the paths of this machine for every node.

    Args:
        graph_model (`onnx_ir.Model`): Changed in place.
    """
    for graph in graph_model.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _cause(error: BaseException) -> str:
    """The innermost cause of an error, which names the operator or the line of code, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[0].split()) if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of internals of torch, and prints and logs what it tries before it succeeds or fails."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


def _runner(content: bytes, kind: str) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of pixels, in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, which all derive from Exception alone
        raise ValueError(f"The exported {kind} cannot be loaded by onnxruntime: {_cause(error)}") from error

    def run(pixels: Tensor) -> Tensor:
        try:
            (logits,) = session.run(["logits"], {"pixels": np.ascontiguousarray(pixels.numpy())})
        except Exception as error:
            raise ValueError(
                f"The exported {kind} does not run on {len(pixels)} images in onnxruntime: {_cause(error)}"
            ) from error
        return torch.from_numpy(logits)

    return run


@torch.no_grad()
def _compare(model: nn.Module, exported: Callable[[Tensor], Tensor], image_size: tuple[int, int]) -> tuple[float, int]:
    """The largest difference of a logit relative to max(1, largest logit), and the number of images compared.

    Raises:
        ValueError: If an image gets another shape of logits, or another class though its margin is larger than the
            difference.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, 3, *image_size, generator=generator) for count in (1, 2, 5)]
    batches[1] = torch.stack([torch.zeros(3, *image_size), torch.ones(3, *image_size)])
    differences, largest = [], 1.0
    for pixels in batches:
        expected, found = model(pixels), exported(pixels)
        if found.shape != expected.shape:
            raise ValueError(
                f"The exported model returns logits of shape {tuple(found.shape)} for {len(pixels)} images, not "
                f"{tuple(expected.shape)}. Nothing was written."
            )
        difference = (found - expected).abs().amax(1)
        top = expected.topk(min(2, expected.shape[1]), dim=1).values
        clear = top[:, 0] - top[:, -1] > difference
        if (clear & (found.argmax(1) != expected.argmax(1))).any():
            raise ValueError(
                "The exported model predicts other classes than the model where two logits are further apart than "
                f"the difference of {difference.max().item():.2g}. Nothing was written."
            )
        differences.append(difference)
        largest = max(largest, expected.abs().max().item())
    return torch.cat(differences).max().item() / largest, sum(map(len, batches))
