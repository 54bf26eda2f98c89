"""Activation checkpointing in two routes.

A checkpointed block keeps only its input, and runs a second time in the backward pass. By then the forward pass has
left its route, so the block would use other adapters and other gradient masks, and it would count its batch twice in
the running statistics. Here every block is repeated as it ran the first time, by way of the `context_fn` of
`torch.utils.checkpoint.checkpoint`:

- transformers takes `context_fn` as an option, which [`enable`] sets;
- timm has no such option. It looks `torch.utils.checkpoint.checkpoint` up when it calls it, so [`forward_pass`] puts a
  version with the option in its place while a model runs.

Reentrant checkpointing has no `context_fn` and would give wrong gradients without an error: it is refused.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch.utils.checkpoint
from peft.utils.other import ModulesToSaveWrapper
from timm.layers import use_reentrant_ckpt
from torch import nn
from transformers import PreTrainedModel

from . import targets
from .routes import RouteSwitch


Contexts = tuple[AbstractContextManager, AbstractContextManager]

# What timm and transformers name the flag on the modules that checkpoint their parts.
_FLAGS = ("grad_checkpointing", "gradient_checkpointing")
_OPTIONS = ("use_reentrant", "preserve_rng_state", "determinism_check", "context_fn")
_REENTRANT = (
    "Reentrant activation checkpointing (`use_reentrant=True`) is not possible: recomputed layers would not know "
    "their route, and the gradients would be wrong."
)


# ---- turning it on and off ----


def check_options(options: dict[str, Any] | None, every_n_layers: int = 1) -> dict[str, Any]:
    """The options of `torch.utils.checkpoint.checkpoint`, with `use_reentrant` filled in.

    Raises:
        ValueError: If an option is unknown, or if recomputed layers would not be what they were.
    """
    options = dict(options or {})
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ValueError(
            f"Unknown options of activation checkpointing: {', '.join(unknown)}. Possible are {', '.join(_OPTIONS)}; "
            "and with transformers `every_n_layers` and `offload`."
        )
    if options.get("use_reentrant"):
        raise ValueError(f"{_REENTRANT} Leave the option out or pass `use_reentrant=False`.")
    if not options.get("preserve_rng_state", True):
        raise ValueError(
            "`preserve_rng_state=False` is not possible: recomputed layers would draw other random numbers, so that "
            "dropout and stochastic depth would drop other values than in the forward pass."
        )
    if not isinstance(every_n_layers, int) or every_n_layers < 1:
        raise ValueError(f"`every_n_layers` must be an integer of at least 1, got {every_n_layers!r}.")
    return options | {"use_reentrant": False}


def enable(
    network: nn.Module, options: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
) -> None:
    """Turns activation checkpointing on; see [`AutoLoraModel.activation_checkpointing_enable`].

    Args:
        network (`nn.Module`): The timm or transformers model inside an `AutoLoraModel`.
        options (`dict`, *optional*): Options of `torch.utils.checkpoint.checkpoint`; only transformers passes them on.
        every_n_layers (`int`), offload (`bool`): As in transformers, only for its models.

    Raises:
        ValueError: If the library has no activation checkpointing for this architecture, or the options are not
            possible; nothing is changed then.
    """
    options = check_options(options, every_n_layers)
    # In transformers' wrapper it is timm that checkpoints.
    network = getattr(network, "timm_model", network)
    if isinstance(network, PreTrainedModel):
        _check_transformers(network)
        options["context_fn"] = functools.partial(contexts, options.get("context_fn"))
        network.activation_checkpointing_enable(options, every_n_layers=every_n_layers, offload=offload)
        return
    given = options.keys() - {"use_reentrant", "preserve_rng_state"}
    given |= {name for name, used in (("every_n_layers", every_n_layers != 1), ("offload", offload)) if used}
    if given:
        raise ValueError(f"timm takes no options for activation checkpointing, got {', '.join(sorted(given))}.")
    if use_reentrant_ckpt():
        raise ValueError(
            f"{_REENTRANT} timm was told to use it: unset the environment variable TIMM_REENTRANT_CKPT, or call "
            "`timm.layers.set_reentrant_ckpt(False)`."
        )
    _enable_timm(network)


def _check_transformers(network: PreTrainedModel) -> None:
    # Models whose code came with the checkpoint may still have the form that passes no options on.
    old = "value" in inspect.signature(network._set_gradient_checkpointing).parameters
    if old or not network.supports_gradient_checkpointing:
        raise ValueError(_not_available("transformers", network))


def _enable_timm(network: nn.Module) -> None:
    message = _not_available("timm", network)
    if not hasattr(network, "set_grad_checkpointing"):
        raise ValueError(message)
    try:
        network.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError) as error:
        disable(network)
        raise ValueError(message) from error
    if not is_enabled(network):
        raise ValueError(message)


def _not_available(library: str, network: nn.Module) -> str:
    return (
        f"{library} has no activation checkpointing for {type(network).__name__}: leave it out and, to save memory, "
        "use smaller batches with `gradient_accumulation_steps`."
    )


def disable(network: nn.Module) -> None:
    """Turns activation checkpointing off, in whichever way it was turned on."""
    for module in network.modules():
        for flag in _FLAGS:
            if module.__dict__.get(flag):
                setattr(module, flag, False)
        module.__dict__.pop("_gradient_checkpointing_func", None)


def is_enabled(network: nn.Module) -> bool:
    return any(module.__dict__.get(flag) for module in network.modules() for flag in _FLAGS)


# ---- methods of a model ----


class Checkpointed:
    """The methods of [`AutoLoraModel`] that turn activation checkpointing on and off."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Saves memory in training: blocks keep only their input and run again, in their route, in the backward pass.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*): Options of `torch.utils.checkpoint.checkpoint`, for
                transformers models.
            every_n_layers (`int`), offload (`bool`): As in transformers, for its models: checkpoint only every n-th
                block; keep the inputs of blocks in the host's memory.

        Raises:
            ValueError: If the library has no activation checkpointing for this architecture, or for reentrant
                checkpointing, whose gradients would be wrong.
        """
        enable(self.get_base_model(), activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """Turns activation checkpointing off."""
        disable(self.get_base_model())

    @property
    def is_activation_checkpointing(self) -> bool:
        return is_enabled(self.get_base_model())

    # The older names of transformers, which would otherwise reach the network inside.

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing


# ---- a forward pass, and repeating its parts ----


@contextmanager
def forward_pass(network: nn.Module, switch: RouteSwitch) -> Iterator[None]:
    """Context of one forward pass of `network` in the current route.

    Raises:
        ValueError: If activation checkpointing was turned on in a way that would lose the route.
    """
    if not torch.is_grad_enabled() or not is_enabled(network):
        yield
        return
    _check_functions(network)
    with _running(_Pass(network, switch)):
        yield


def contexts(inner: Callable[[], Contexts] | None = None) -> Contexts:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`; `inner` is one that the caller has of their own.

    It refers to no model, but to the forward pass that is running, so that copies of a model are independent.
    """
    forward, recompute = (nullcontext(), nullcontext()) if inner is None else inner()
    running = _RUNNING.get()
    return forward, recompute if running is None else _Repeatable(running, recompute)


class _Pass:
    """What a part of a forward pass needs in order to run again as it did."""

    def __init__(self, network: nn.Module, switch: RouteSwitch) -> None:
        self.switch, self.route = switch, switch.current
        # Besides the routes, `disable_adapter` sets these.
        wrappers = (module for module in network.modules() if isinstance(module, ModulesToSaveWrapper))
        self.disabled = [(module, module._disable_adapters) for module in [*switch.layers, *wrappers]]
        # As they are now, since some kinds of norm use the statistics in training too.
        self.statistics = [
            (norm, _copies(norm._buffers)) for norm in targets.statistics_norms(network).values() if norm.training
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The state of the pass; afterwards everything is as before."""
        disabled = [(module, module._disable_adapters) for module, _ in self.disabled]
        try:
            with self.switch.use(self.route):
                for module, value in self.disabled:
                    module._disable_adapters = value
                live = [(norm, norm._buffers) for norm, _ in self.statistics]
                try:
                    for norm, buffers in self.statistics:
                        norm._buffers = _copies(buffers)
                    # Blocks inside this one are checkpointed the same way again, maybe on a thread of autograd's.
                    with _running(self):
                        yield
                finally:
                    for norm, buffers in live:
                        norm._buffers = buffers
        finally:
            for module, value in disabled:
                module._disable_adapters = value


class _Repeatable:
    """Context in which a checkpointed block is recomputed: as often as its graph is walked."""

    def __init__(self, running: _Pass, inner: AbstractContextManager) -> None:
        self.running, self.inner = running, inner
        self.open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.running.again())
            stack.enter_context(self.inner)
            self.open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self.open.pop().__exit__(*error)


def _copies(buffers: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {key: None if buffer is None else buffer.clone() for key, buffer in buffers.items()}


def _check_functions(network: nn.Module) -> None:
    for module in network.modules():
        if module.__dict__.get("gradient_checkpointing"):
            options = getattr(module.__dict__.get("_gradient_checkpointing_func"), "keywords", {})
            if getattr(options.get("context_fn"), "func", None) is not contexts or options.get("use_reentrant"):
                raise ValueError(
                    f"Activation checkpointing was turned on in the {type(network).__name__} itself, so that "
                    "recomputed layers would not know their route. Turn it off there, and on with "
                    "`activation_checkpointing_enable()` of the AutoLoraModel."
                )


# ---- `torch.utils.checkpoint.checkpoint` while a model runs ----

_RUNNING: ContextVar[_Pass | None] = ContextVar("autolora_forward_pass", default=None)
_lock = threading.Lock()
_users = 0
_replaced: tuple[Callable[..., Any], Callable[..., Any]] | None = None


@contextmanager
def _running(current: _Pass) -> Iterator[None]:
    """Makes `current` the running pass, and `torch.utils.checkpoint.checkpoint` a version that heeds it."""
    _replace_checkpoint()
    token = _RUNNING.set(current)
    try:
        yield
    finally:
        _RUNNING.reset(token)
        _restore_checkpoint()


def _replace_checkpoint() -> None:
    global _users, _replaced
    with _lock:
        if _users == 0:
            original = torch.utils.checkpoint.checkpoint
            _replaced = original, _heeding(original)
            torch.utils.checkpoint.checkpoint = _replaced[1]
        _users += 1


def _restore_checkpoint() -> None:
    global _users
    with _lock:
        _users -= 1
        # Unless other code has put something in its place since.
        if _users == 0 and torch.utils.checkpoint.checkpoint is _replaced[1]:
            torch.utils.checkpoint.checkpoint = _replaced[0]


def _heeding(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        # Models of other threads come through here too.
        if _RUNNING.get() is not None:
            if kwargs.get("use_reentrant"):
                raise ValueError(_REENTRANT)
            kwargs["use_reentrant"] = False
            kwargs["context_fn"] = functools.partial(contexts, kwargs.get("context_fn"))
        return original(*args, **kwargs)

    return checkpoint
