"""The routes through one network: the deployed robust one and, mostly, a natural one.

A route says which adapters are on, which BatchNorm set is used and which parameters may receive gradient (AutoLoRa, Xu
et al., ICLR 2024). Switching sets flags only: PEFT's own `set_adapter` and `disable_adapter` also rewrite
`requires_grad` and, for the head, change which weights are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


ROBUST = "robust"
NATURAL = "natural"
ROUTES = (ROBUST, NATURAL)


@dataclass
class Route:
    """One way through the network.

    Args:
        adapters (`tuple[str, ...]`): Adapters in the forward pass; none: the layers run without a branch.
        blocked (`list[nn.Parameter]`): Parameters the route uses but must not train (stop-gradient of their current
            values).
        swapped (`list[tuple[nn.Module, str, nn.Module, nn.Module]]`): `(parent, child name, original, replacement)`:
            layers that another one stands in for while the route runs.
        untracked (`list[nn.Module]`): Layers with running statistics (BatchNorm and its kin) that this route leaves
            alone, though it normalises as they do.
    """

    adapters: tuple[str, ...]
    blocked: list[nn.Parameter] = field(default_factory=list)
    swapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)
    untracked: list[nn.Module] = field(default_factory=list)


class RouteSwitch:
    """Holds the routes of a model and runs code inside one of them.

    Args:
        layers (`list[BaseTunerLayer]`): Every layer that carries a branch.
        routes (`dict[str, Route]`): The routes by name.
        resting (`str`): The deployed route: what a plain forward runs.
    """

    def __init__(self, layers: list[BaseTunerLayer], routes: dict[str, Route], resting: str = ROBUST) -> None:
        self.layers = layers
        self.routes = routes
        self.current = self._checked(resting)
        self._held: list[nn.Parameter] = []
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._enter(resting)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Runs the body in route `name`; flags and `requires_grad` are as before afterwards, also after an error."""
        outer, outer_held, outer_kept = self.current, self._held, [module for module, _ in self._kept]
        held = self.routes[self._checked(name)].blocked
        # A route inside another one blocks what it says, not the union of both.
        for parameter in outer_held:
            parameter.requires_grad_(True)
        held = [parameter for parameter in held if parameter.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)
        self._leave(outer)
        self._enter(name)
        self._keep_statistics(self.routes[name].untracked)
        self.current, self._held = name, held
        try:
            yield
        finally:
            self._leave(name)
            self._enter(outer)
            self._keep_statistics(outer_kept)
            for parameter in held:
                parameter.requires_grad_(True)
            for parameter in outer_held:
                parameter.requires_grad_(False)
            self.current, self._held = outer, outer_held

    @contextmanager
    def without_stop_gradient(self) -> Iterator[None]:
        """Inside, routes that are entered let gradient through to everything that trains, as a measurement needs."""
        blocked = [(route, route.blocked) for route in self.routes.values()]
        for route, _ in blocked:
            route.blocked = []
        try:
            yield
        finally:
            for route, parameters in blocked:
                route.blocked = parameters

    @property
    def names(self) -> tuple[str, ...]:
        """The routes of the model, the deployed one first."""
        return tuple(self.routes)

    def rest_in(self, name: str) -> None:
        """Makes `name` the deployed route, so that a plain forward runs it."""
        self._leave(self.current)
        self._enter(self._checked(name))
        self.current = name

    def refresh(self) -> None:
        """Sets the flags of the current route again, after other code has changed them."""
        self._enter(self.current)

    def _checked(self, name: str) -> str:
        if name not in self.routes:
            raise ValueError(f"Unknown route {name!r}; this model has {', '.join(map(repr, self.routes))}.")
        return name

    def _enter(self, name: str) -> None:
        route = self.routes[name]
        for layer in self.layers:
            layer._disable_adapters = not route.adapters
            if route.adapters:
                layer._active_adapter = list(route.adapters)
        for parent, child, original, replacement in route.swapped:
            # What is not in the model is not reached by its `train()` and `eval()`.
            parent._modules[child] = replacement.train(original.training)

    def _leave(self, name: str) -> None:
        route = self.routes[name]
        for parent, child, original, replacement in route.swapped:
            parent._modules[child] = original.train(replacement.training)

    def _keep_statistics(self, modules: list[nn.Module]) -> None:
        """Lets `modules` work on copies of their buffers from now on; the buffers kept so far come back."""
        for module, buffers in self._kept:
            module._buffers = buffers
        self._kept = [(module, module._buffers) for module in modules]
        for module in modules:
            # Whatever kind of layer it is: what it gathers goes with the copies.
            module._buffers = {key: None if b is None else b.clone() for key, b in module._buffers.items()}
