"""Which radii the page offers, and how it writes them."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Norm, ThreatModel


# What the field measures at: up to this size as on CIFAR, above it as on ImageNet (RobustBench; Croce and Hein, ICML
# 2021, for L1).
_SMALL = 64
_USUAL: dict[bool, dict[Norm, float]] = {
    True: {"linf": 8 / 255, "l2": 0.5, "l1": 12.0},
    False: {"linf": 4 / 255, "l2": 3.0, "l1": 255.0},
}
_PARTS, _MOST = 8, 3


@dataclass(frozen=True)
class Scale:
    """The radii of one norm: from 0 in eighths of a usual one to three times as much.

    Args:
        norm (`str`): The norm.
        usual (`float`): The radius that the model was trained for, or else one that the field measures at.
        is_trained (`bool`): Whether it is the trained one.
    """

    norm: Norm
    usual: float
    is_trained: bool

    @classmethod
    def of(cls, norm: Norm, trained: ThreatModel, image_size: tuple[int, int]) -> Scale:
        """The scale of `norm` for a model that was trained to withstand `trained`."""
        if norm == trained.norm:
            return cls(norm, trained.eps, True)
        return cls(norm, _USUAL[max(image_size) <= _SMALL][norm], False)

    @property
    def count(self) -> int:
        """Radii above 0."""
        limit = ThreatModel(self.norm, self.usual).largest_eps
        return min(_MOST * _PARTS, int(limit / self.usual * _PARTS + 1e-9))

    @property
    def step(self) -> float:
        """Distance of two radii."""
        return self.usual / _PARTS

    @property
    def largest(self) -> float:
        return self.radius(self.count)

    def radius(self, number: float) -> float:
        """The radius with this number, which is cut to the scale; number 8 is exactly the usual radius."""
        return self.usual * (min(max(round(number), 0), self.count) / _PARTS)

    def nearest(self, eps: float) -> float:
        """The radius of the scale next to `eps`, which may come rounded from a browser."""
        return self.radius(eps / self.step)

    def curve(self, eps: float) -> list[float]:
        """The radii of a chart, `eps` among them."""
        return sorted({*(self.radius(number) for number in range(0, self.count + 1, _PARTS // 2)), eps})


def radius_text(norm: Norm, eps: float) -> str:
    """A radius in [0, 1] pixels and in those of 8-bit images, such as "0.1 = 25.5/255"; in L1 nobody writes it so."""
    if eps == 0 or norm == "l1":
        return f"{eps:.4g}"
    return f"{eps:.4g} = {255 * eps:.4g}/255"
