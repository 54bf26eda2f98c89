"""The checks of `architecture_coverage.py`: what has to hold for an architecture, and the same asked of stock PEFT.

`ROWS` are the architectures by name, `check_row` runs everything on one of them and returns what it found as a
dictionary that fits JSON; `failures` of it lists what does not hold, one readable line each. Tests can use them:

    sys.path.insert(0, "scripts")
    from architecture_checks import ROWS, check_row, failures

    assert not failures(check_row(ROWS["timm/resnet"]))
"""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import timm
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora.layer import LoraLayer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraModel,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.attacks.pgd import attack_mode
from autolora_hf.frozen import FrozenRoute
from autolora_hf.objectives import Batch


TABLE = Path(__file__).with_name("coverage_rows.json")
NUM_CLASSES = 5
# BatchNorm of 1 x 1 maps cannot train on one image.
BATCH = 2
MODES = ("full", "adapter")
ROUTES = ("robust", "natural")
PASS = "PASS"
TOLERANCE = 1e-4
# Norms that are folded into convolutions round differently, and deep networks without training amplify it.
FOLDED_TOLERANCE = 1e-3


# ---- rows ----


@dataclass(frozen=True)
class Row:
    """One architecture to check.

    Args:
        library (`str`): `"timm"` or `"transformers"`.
        family (`str`): Module of timm that registers the model, or key of transformers' image classification mapping.
        model (`str`): Name of timm's model, or class of transformers.
        kwargs (`dict`): Arguments of timm's constructor, or fields of the configuration of transformers.
        image_size (`tuple[int, int]`): Height and width of the images.
        variant (`str`): What tells a row from the first one of its family, for which it is empty.
        extra (`bool`): An unusual variant, beyond what covers families and classes.
        why (`str`): Why another instance than the smallest one was taken, if so.
    """

    library: str
    family: str
    model: str
    kwargs: dict[str, Any]
    image_size: tuple[int, int]
    variant: str = ""
    extra: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        """Unique: library, family and, for further rows of a family, the variant."""
        return f"{self.library}/{self.family}" + (f"/{self.variant}" if self.variant else "")

    def build(self) -> nn.Module:
        """The model in eval mode with random weights, the same ones each time, none of them at a trivial value."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.library == "timm":
                model = timm.create_model(self.model, num_classes=NUM_CLASSES, **self.kwargs)
            else:
                kind = getattr(transformers, self.model)
                # Configurations fill in and change what they are given.
                model = kind(kind.config_class(num_labels=NUM_CLASSES, **copy.deepcopy(self.kwargs)))
            unsettle(model, self.image_size)
        return model.eval()

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.image_size, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)


def read_rows(table: Path = TABLE) -> dict[str, Row]:
    """Every row of the table by its name, those of timm first."""
    rows = [Row(**{**entry, "image_size": tuple(entry["image_size"])}) for entry in json.loads(table.read_text())]
    assert len({row.name for row in rows}) == len(rows), "Rows of the table must have different names."
    return {row.name: row for row in rows}


@torch.no_grad()
def unsettle(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Gives every weight a share in the logits, and norms statistics that are their own.

    Libraries start heads and residual branches at zero, where any two models agree and gradients vanish, weights of
    narrow models much too small, and running statistics at values that let the signal fade on its way.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if (parameter - parameter.flatten()[0]).abs().max() < 1e-12:
            parameter += (0.1 if parameter.ndim < 2 else 0.02) * torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter *= (parameter[0].numel() ** -0.5 / parameter.square().mean().sqrt()).clamp(min=1)
    norms = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            if norm.weight is not None and norm.weight.abs().mean() < 0.5:
                norm.weight += 1
        model.train()(torch.randn(4 * BATCH, 3, *image_size))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var *= 0.9 + 0.2 * torch.rand_like(norm.running_var)


ROWS = read_rows() if TABLE.exists() else {}


# ---- tools ----


class Pictures(Dataset):
    """A few random images with labels 0, 1, 2, ..."""

    def __init__(self, count: int, image_size: tuple[int, int], seed: int) -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (count, *image_size, 3), dtype=np.uint8)
        self.images = [Image.fromarray(pixels) for pixels in noise]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], index % NUM_CLASSES


def logits_of(output: Any) -> Tensor:
    """The logits among what a bare model may return, in train mode too."""
    if isinstance(output, (tuple, list)):
        return output[0]
    if isinstance(output, Tensor):
        return output
    # PP-LCNet of transformers gives its logits another name.
    return output.logits if "logits" in output else output.last_hidden_state


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit if that is above 1."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


class Differs(AssertionError):
    """Two results that should agree do not, which may be rounding: see [`run`]."""


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    error = difference(found, expected)
    if error > tolerance:
        raise Differs(f"{what}: relative difference {error:.1e}")


def listed(names: set[str] | list[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def message_of(error: BaseException) -> str:
    """One line that says what went wrong; assertions of this file speak for themselves."""
    text = " ".join(str(error).split()) or "no message"
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Moves both factors of every branch, the head and, in mode `adapter`, the norms.

    The change of a weight is a tenth of its size, so that deep networks without norms stay finite.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.lora_B.keys():
            factor = module.lora_B[adapter]
            factor = factor.weight if isinstance(factor, nn.Module) else factor
            factor.copy_(torch.randn(factor.shape, generator=generator))
            size = module.get_delta_weight(adapter).square().mean().sqrt()
            base = module.get_base_layer()
            weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
            factor *= 0.1 * weight.square().mean().sqrt().clamp(min=1e-3) / size.clamp(min=1e-12)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# ---- the checks ----


@dataclass
class Case:
    """A row in one mode, while it is checked; checks follow one another on the same model."""

    row: Row
    mode: str
    bare: nn.Module
    model: AutoLoraModel
    folder: Path
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = torch.rand(BATCH, 3, *self.row.image_size, generator=torch.Generator().manual_seed(3))
        self.labels = torch.arange(BATCH) % NUM_CLASSES

    @property
    def images(self) -> Tensor:
        """The pixels as the bare model takes them."""
        return self.model.pixel_space().normalize(self.pixels)

    @torch.no_grad()
    def logits(self, model: AutoLoraModel | None = None) -> dict[str, Tensor]:
        """Logits of both routes in eval mode."""
        model = (self.model if model is None else model).eval()
        return {route: model.pixel_space(route)(self.pixels) for route in ROUTES}

    @contextmanager
    def precision(self, dtype: torch.dtype) -> Iterator[None]:
        """Everything in `dtype`; float32 values come back from float64 to the bit."""
        pixels = self.pixels
        try:
            self.bare.to(dtype), self.model.to(dtype)
            self.pixels = pixels.to(dtype)
            yield
        finally:
            self.bare.float(), self.model.float()
            self.pixels = pixels

    def state(self) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self.model.state_dict().items()}

    def parts(self) -> dict[str, set[str]]:
        """Names of the model's parameters by what they are part of."""
        head = {id(parameter) for module in self.model.heads for parameter in module.parameters()}
        parts: dict[str, set[str]] = {name: set() for name in ("natural", "robust", "head", "norms", "backbone")}
        for name, parameter in self.model.named_parameters():
            branch = re.search(r"\.lora_[AB]\.(natural|robust)\b", name)
            if branch:
                parts[branch[1]].add(name)
            elif id(parameter) in head:
                parts["head"].add(name)
            elif ".modules_to_save.robust." in name:
                parts["norms"].add(name)
            else:
                parts["backbone"].add(name)
        return parts


def own_name(name: str) -> str:
    """Name in the bare model of a parameter of the adapted one."""
    return re.sub(r"\.(base_layer|modules_to_save\.robust)(?=\.)", "", name.removeprefix("base_model.model."))


def check_start(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """At the start both routes compute what the bare model computes."""
    with case.precision(dtype):
        with torch.no_grad():
            expected = logits_of(case.bare(case.images))
        assert expected.isfinite().all(), "the bare model's logits are not finite"
        count, share = branches_of(case.model)
        assert share >= 0.5, f"{count} branches on {share:.0%} of the weights of layers"
        if difference(expected[:1], expected[1:]) < TOLERANCE:
            case.notes.append("the bare model's logits hardly depend on the image")
        for route, logits in case.logits().items():
            assert_close(logits, expected, f"{route} route and bare model")


def branches_of(model: AutoLoraModel) -> tuple[int, float]:
    """How many layers carry a branch, and their share of the weights of linear layers and convolutions."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    own = {id(module) for head in model.heads for module in head.modules()}
    layers = [m for m in model.get_base_model().modules() if isinstance(m, kinds) and id(m) not in own]
    carrying = {id(layer.get_base_layer()): layer for layer in model.lora_layers().values()}
    inner = {id(m) for layer in carrying.values() for side in (layer.lora_A, layer.lora_B) for m in side.modules()}
    total = sum(layer.weight.numel() for layer in layers if id(layer) not in inner)
    found = sum(layer.weight.numel() for layer in layers if id(layer) in carrying)
    return len(carrying), round(found / max(total, 1), 3)


def check_attack(case: Case) -> None:
    """An attack through a model in train mode leaves no trace."""
    model = case.model.train()
    model.zero_grad(set_to_none=True)
    state, random_state = case.state(), torch.get_rng_state()
    flags = [(module.training, module) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    adversarial = PGD(steps=2)(model.pixel_space("robust"), case.pixels, case.labels)
    assert adversarial.isfinite().all(), "adversarial images are not finite"
    assert not torch.equal(adversarial, case.pixels), "the attack changed nothing"
    after = model.state_dict()
    changed = {key for key in state if not torch.equal(state[key], after[key])}
    assert not changed and state.keys() == after.keys(), f"the attack changed {listed(changed)}"
    assert torch.equal(torch.get_rng_state(), random_state), "the attack drew from the global random state"
    assert all(module.training == training for training, module in flags), "the attack changed training flags"
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable, "changed requires_grad"
    assert all(parameter.grad is None for parameter in model.parameters()), "the attack left gradients"


def check_follows(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """An attack sees the weights as they are now, branches too, on the model and on its frozen copy."""
    with case.precision(dtype), torch.no_grad():
        case = replace(case, model=copy.deepcopy(case.model).train())
        case.pixels = case.pixels.to(dtype)
        model = case.model
        frozen = {route: FrozenRoute(model, route) for route in ROUTES}
        with attack_mode(model):
            model.pixel_space("robust")(case.pixels)
        for copied in frozen.values():
            copied(case.pixels)
        perturb(model)
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= 1 + 0.05 * torch.randn(parameter.shape, generator=generator)
        with attack_mode(model):
            live = {route: model.pixel_space(route)(case.pixels) for route in ROUTES}
        # Layers that keep something in eval mode forget it when they are told to train.
        model.train()
        expected = case.logits()
        assert not torch.equal(expected["robust"], expected["natural"]), "branches make no difference"
        for route in ROUTES:
            assert_close(live[route], expected[route], f"{route} route after the weights changed")
            found = frozen[route].refresh()(case.pixels)
            assert_close(found, expected[route], f"frozen {route} route after the weights changed", FOLDED_TOLERANCE)


def check_step(case: Case) -> None:
    """One step of the trainer changes what it should, after which the routes differ."""
    before, parts = case.state(), case.parts()
    train(case)
    after = case.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for part in ("natural", "head", "backbone" if case.mode == "full" else "robust"):
        assert changed & parts[part], f"the step did not change {part}"
    if case.mode == "adapter":
        frozen = changed & parts["backbone"]
        assert not frozen, f"the step changed the frozen backbone: {listed(frozen)}"
    # Some models have infinite bounds among their buffers.
    finite = [key for key, tensor in before.items() if tensor.isfinite().all()]
    assert all(after[key].isfinite().all() for key in finite), "weights are not finite after the step"
    logits = case.logits()
    assert all(tensor.isfinite().all() for tensor in logits.values()), "the logits are not finite after the step"
    assert not torch.equal(logits["robust"], logits["natural"]), "the routes are still equal after the step"


def train(case: Case, **options: Any) -> None:
    """One step of `AutoLoraTrainer`, with the evaluation and the checkpoint that follow."""
    size = case.row.image_size
    with tempfile.TemporaryDirectory(dir=case.folder) as output:
        args = AutoLoraTrainingArguments(
            output,
            max_steps=1,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            attack_steps=2,
            eval_attack_steps=1,
            augmentation="none",
            save_only_model=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            # Gradients of a deep random network can be of any size.
            max_grad_norm=1.0,
            **options,
        )
        trainer = AutoLoraTrainer(case.model, args, Pictures(BATCH, size, 0), Pictures(BATCH, size, 1))
        trainer.pop_callback(transformers.PrinterCallback)
        batches, objective = [], trainer.objective

        class Recording(type(objective)):
            """The objective of the trainer, which also keeps what it is given."""

            def __call__(self, forward: Any, batch: Batch, scalars: Any) -> Any:
                loss = {}
                with attack_mode(case.model), torch.no_grad():
                    for kind, pixels in (("clean", batch.pixels), ("adversarial", batch.adversarial)):
                        logits = case.model.pixel_space("robust")(pixels).float()
                        loss[kind] = F.cross_entropy(logits, batch.labels).item()
                batches.append((batch, loss))
                return super().__call__(forward, batch, scalars)

        trainer.objective = Recording()
        trainer.train()
        assert len(batches) == 1, f"{len(batches)} batches in one step"
        batch, loss = batches[0]
        change = (batch.adversarial - batch.pixels).abs().max().item()
        assert 0 < change <= args.threat_model.eps + 1e-6, f"adversarial images are {change:.3g} away"
        if loss["adversarial"] <= loss["clean"]:
            case.notes.append("two steps of PGD did not raise the loss of the robust route")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.state.global_step == 1 and len(losses) == 1, f"{trainer.state.global_step} steps, not 1"
        assert np.isfinite(losses).all(), f"the loss is {losses[0]}"
    case.model.zero_grad(set_to_none=True)


def check_gradients(case: Case) -> None:
    """In each route everything that it trains has a gradient, and nothing else has one."""
    perturb(case.model)
    parts = case.parts()
    bare = copy.deepcopy(case.bare).train()
    F.cross_entropy(logits_of(bare(case.images)), case.labels).backward()
    used = {name for name, parameter in bare.named_parameters() if parameter.grad is not None}
    unused = {name for name, parameter in bare.named_parameters() if parameter.requires_grad} - used
    if unused:
        case.notes.append(f"the architecture does not use {listed(unused)}")
    trained = parts["backbone"] if case.mode == "full" else parts["norms"]
    expected = {
        "natural": parts["natural"] | parts["head"],
        "robust": parts["head"] | parts["robust"] | {name for name in trained if own_name(name) in used},
    }
    model = case.model.train()
    for route, names in expected.items():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model.pixel_space(route)(case.pixels), case.labels).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        missing, extra = names - found.keys(), found.keys() - names
        assert not missing, f"{route} route: no gradient for {listed(missing)}"
        assert not extra, f"{route} route: gradient for {listed(extra)}"
        infinite = {name for name, gradient in found.items() if not gradient.isfinite().all()}
        assert not infinite, f"{route} route: gradient not finite for {listed(infinite)}"
        if route == "natural":
            still = {name for name in parts["natural"] if not found[name].any()}
            if still:
                # For instance queries and keys of attention over a single token.
                case.notes.append(f"{len(still)} of {len(parts['natural'])} natural factors have gradient 0")
    model.zero_grad(set_to_none=True)


def check_saving(case: Case) -> None:
    """A saved model comes back bit for bit."""
    folder = case.folder / "saved"
    case.model.save_pretrained(folder)
    try:
        base = copy.deepcopy(case.bare) if case.mode == "adapter" else None
        loaded = load_autolora_model(folder, base_model=base)
    except ValueError as error:
        if case.mode == "adapter" or "base_model=" not in str(error):
            raise
        case.notes.append("loading needs `base_model=`")
        loaded = load_autolora_model(folder, base_model=copy.deepcopy(case.bare))
    state, expected = loaded.state_dict(), case.model.state_dict()
    assert state.keys() == expected.keys(), f"other tensors: {listed(state.keys() ^ expected.keys())}"
    changed = {key for key in state if not torch.equal(state[key], expected[key])}
    assert not changed, f"other values of {listed(changed)}"
    before, after = case.logits(), case.logits(loaded)
    for route in ROUTES:
        assert torch.equal(before[route], after[route]), f"other logits of the {route} route"


def check_merging(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The deployed model as a plain module computes what the robust route computes."""
    with case.precision(dtype):
        expected = case.logits()["robust"]
        images = case.images
        merged = copy.deepcopy(case.model).merge_and_unload().eval()
        left = [name for name, module in merged.named_modules() if isinstance(module, LoraLayer)]
        assert not left, f"merging left adapters on {listed(left)}"
        with torch.no_grad():
            assert_close(logits_of(merged(images)), expected, "merged model and robust route")


def check_bfloat16(case: Case) -> None:
    """Both routes and the trainer run under bfloat16 autocast."""
    try:
        model = case.model.train()
        for route in ROUTES:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.pixel_space(route)(case.pixels)
                loss = F.cross_entropy(logits, case.labels)
            loss.backward()
            assert loss.isfinite(), f"{route} route: the loss is {loss.item()}"
            infinite = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()}
            assert not infinite, f"{route} route: gradient not finite for {listed(infinite)}"
            model.zero_grad(set_to_none=True)
        train(case, bf16=True)
    except Exception as error:
        bare = copy.deepcopy(case.bare).train()
        try:
            with torch.autocast("cpu", torch.bfloat16):
                logits_of(bare(case.images)).float().square().sum().backward()
        except Exception as bare_error:
            raise Inapplicable(f"the bare model fails too ({message_of(bare_error)})") from error
        raise


class Inapplicable(Exception):
    """A check that says nothing about a row, with the reason."""


CHECKS: dict[str, Callable[[Case], None]] = {
    "start": check_start,
    "attack": check_attack,
    "follows": check_follows,
    "step": check_step,
    "gradients": check_gradients,
    "saving": check_saving,
    "merging": check_merging,
    "bfloat16": check_bfloat16,
}


def check_stock_loading(row: Row, bare: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """An adapter on the default layers loads with stock PEFT, if it is said to."""
    config = AutoLoraConfig(mode="adapter")
    model = get_autolora_model(copy.deepcopy(bare), config, preprocessing=row.preprocessing())
    case = Case(row, "adapter", bare, model, folder)
    perturb(model)
    model.save_pretrained(folder / "stock")
    if not (folder / "stock" / "adapter_config.json").exists():
        raise Inapplicable("needs this package: a branch is on layers that PEFT has no exact LoRA for")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), folder / "stock").eval().to(dtype)
    with torch.no_grad(), case.precision(dtype):
        expected = case.logits()["robust"]
        assert_close(logits_of(loaded(case.images)), expected, "stock PEFT and robust route")


# ---- stock PEFT ----


def head_names(model: nn.Module) -> list[str]:
    """Names of the classification layers as the library tells them, for models that this package refuses."""
    if hasattr(model, "get_classifier"):
        heads = model.get_classifier()
        heads = list(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    else:
        heads = [m for m in model.modules() if getattr(m, "out_features", None) == NUM_CLASSES][-1:]
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def check_stock_peft(
    row: Row, bare: nn.Module, heads: list[str], targets: str, dtype: torch.dtype = torch.float32
) -> None:
    """What anyone would ask of `get_peft_model`: same start, every factor alive, exact merging.

    Args:
        targets (`str`): `"all-linear"`, or `"all"` for every linear layer and 2-d convolution but the head.
    """
    if targets == "all":
        layers = [n for n, m in bare.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in heads]
        # An expression matches whole names; a list would match ends of names, and layers nobody meant.
        targets = "|".join(re.escape(name) for name in layers)
    normalize = row.preprocessing()
    pixels = torch.rand(BATCH, 3, *row.image_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    bare = copy.deepcopy(bare).to(dtype)
    images = (pixels - normalize.mean[0]) / normalize.std[0]
    with torch.no_grad():
        expected = logits_of(bare(images))
    config = peft.LoraConfig(r=8, target_modules=targets, modules_to_save=heads)
    model = peft.get_peft_model(copy.deepcopy(bare), config).eval().to(dtype)
    with torch.no_grad():
        assert_close(logits_of(model(images)), expected, "initial logits")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    logits_of(model(images)).square().sum().backward()
    factors = {name for name, _ in model.named_parameters() if "lora_" in name}
    dead = {name for name, p in model.named_parameters() if "lora_" in name and p.grad is None}
    dead_layers = {re.sub(r"^base_model\.model\.|\.lora_[AB].*", "", name) for name in dead}
    assert not dead, f"{len(dead)} of {len(factors)} LoRA tensors are dead: {listed(dead_layers, 2)}"
    with torch.no_grad():
        expected = logits_of(model(images))
        assert_close(logits_of(model.merge_and_unload()(images)), expected, "merged model")


# ---- one row ----


def check_row(row: Row, modes: tuple[str, ...] = MODES, stock: bool = True) -> dict[str, Any]:
    """Runs every check on one row.

    Args:
        row (`Row`): What to check.
        modes (`tuple[str, ...]`): Modes of `AutoLoraConfig` to check.
        stock (`bool`): Check stock PEFT, too.

    Returns:
        A dictionary with `parameters` (their number), `checks` (by mode and name of the check: `"PASS"`,
        `"FAIL: why"`, `"REFUSED: why"` or `"-: why it does not apply"`), `stock` (the same for stock PEFT), `notes`
        and `seconds` (by what took them).
    """
    result: dict[str, Any] = {"row": asdict(row), "checks": {}, "stock": {}, "notes": [], "seconds": {}}
    with tempfile.TemporaryDirectory() as folder, quiet():
        with timed(result, "build"):
            try:
                bare = row.build()
            except ImportError as error:
                result["checks"]["model"] = {"build": f"-: {message_of(error)}"}
                return result
        result["parameters"] = sum(parameter.numel() for parameter in bare.parameters())
        heads: list[str] = []
        for mode in modes:
            heads = check_mode(row, bare, mode, Path(folder), result) or heads
        if "adapter" in modes and "build" not in result["checks"]["adapter"]:
            with timed(result, "stock_loading"):
                outcome = run(check_stock_loading, row, bare, Path(folder))
            result["checks"]["adapter"]["stock_loading"] = outcome
        if stock:
            for targets in ("all", "all-linear"):
                with timed(result, f"stock/{targets}"):
                    names = heads or head_names(bare)
                    result["stock"][targets] = run(check_stock_peft, row, bare, names, targets)
    result["notes"] = list(dict.fromkeys(result["notes"]))
    return result


def check_mode(row: Row, bare: nn.Module, mode: str, folder: Path, result: dict[str, Any]) -> list[str]:
    """Adds the checks of one mode to `result`; returns the names of the heads, none if the model was refused."""
    outcomes = result["checks"].setdefault(mode, {})
    config = AutoLoraConfig(mode=mode, target_modules="all" if mode == "adapter" else None)
    with timed(result, f"{mode}/build"):
        try:
            torch.manual_seed(0)
            model = get_autolora_model(copy.deepcopy(bare), config, preprocessing=row.preprocessing())
        except (ValueError, TypeError) as error:
            outcomes["build"] = f"REFUSED: {message_of(error)}"
            return []
        except Exception as error:
            outcomes["build"] = f"FAIL: {message_of(error)}"
            return []
    case = Case(row, mode, bare, model, folder / mode)
    case.folder.mkdir()
    result.setdefault("branches", {})[mode] = branches_of(model)
    for name, check in CHECKS.items():
        with timed(result, f"{mode}/{name}"):
            outcomes[name] = run(check, case)
    result["notes"] += case.notes
    return model.autolora_config.heads


def run(check: Callable[..., None], *args: Any) -> str:
    """Outcome of one check.

    Some networks with random weights magnify rounding errors a thousandfold. Where two results differ in float32 they
    are compared again in float64, by the same tolerance.
    """
    try:
        try:
            check(*args)
        except Differs:
            check(*args, dtype=torch.float64)
    except Inapplicable as error:
        return f"-: {error}"
    except Exception as error:
        return f"FAIL: {message_of(error)}"
    return PASS


def failures(result: dict[str, Any]) -> list[str]:
    """What does not hold for this package, one line for each check."""
    return [
        f"{mode}, {name}: {outcome}"
        for mode, outcomes in result["checks"].items()
        for name, outcome in outcomes.items()
        if not outcome.startswith((PASS, "-"))
    ]


@contextmanager
def timed(result: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        result["seconds"][name] = round(time.perf_counter() - start, 2)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings and logs: models are random, data sets tiny, and the table is what counts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
