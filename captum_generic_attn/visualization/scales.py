"""Colour scales of heat maps and texts: the value of the darkest colour, and the sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

# Labels of colour bars: whether the scale is shared.
OWN, ONE = "own scale", "one scale for all"
# Gradients have outliers: in a comparison, the darkest colour stands for this percentile.
_PERCENTILE = 99.5


class Scale(NamedTuple):
    """A colour scale.

    `maximum` has the darkest colour. If `signed`, the scale goes from `-maximum` to `maximum`,
    otherwise from 0. If `cut`, there are values beyond, which have the darkest colours too.
    """

    maximum: float
    signed: bool = False
    cut: bool = False

    @property
    def least(self) -> float:
        """The lower end of the scale."""
        return -self.maximum if self.signed else 0.0


def largest(values: NDArray[np.float64]) -> float:
    """The value of the darkest colour, except in comparisons of methods."""
    return float(np.abs(values).max())


def darkest(values: NDArray[np.float64]) -> float:
    """The value of the darkest colour in comparisons of methods."""
    magnitudes = np.abs(values)
    return float(np.percentile(magnitudes, _PERCENTILE)) or float(magnitudes.max())


def scale_of(
    several: Sequence[ArrayLike], top: Callable[[NDArray[np.float64]], float] = largest
) -> Scale:
    """The scale that several maps or texts share: signed if a value of them is negative.

    Args:
        several: the values of each map or text, at least one.
        top: computes the value of the darkest colour for one of them; the scale takes the largest.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in several]
    maximum = max(map(top, arrays))
    signed = any(bool((values < 0).any()) for values in arrays)
    return Scale(maximum, signed, cut=maximum < max(map(largest, arrays)))


def scales_of(several: Sequence[ArrayLike], *, shared: bool = False) -> list[Scale]:
    """One scale per map or text: its own, or the `shared` one."""
    if shared:
        return [scale_of(several)] * len(several)
    return [scale_of([values]) for values in several]


def nothing_of(label: str) -> str:
    """The text in place of a scale from 0 to 0."""
    return f"{label}: 0 everywhere" if label else "0 everywhere"
