"""Scales of heat maps and texts: which value is drawn darkest, and whether negative ones are drawn.

All figures take theirs from here, and so does the HTML of texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

# What a bar says of its scale.
OWN, ONE = "own scale", "one scale for all"
# Gradients have outliers: in a comparison, the darkest colour stands for this share of the pixels.
_PERCENTILE = 99.5


class Scale(NamedTuple):
    """What is drawn darkest; whether negative values are drawn, down to as much below 0; whether
    the darkest colours stand for all that is beyond them as well.
    """

    maximum: float
    signed: bool = False
    cut: bool = False

    @property
    def least(self) -> float:
        """Where the scale begins."""
        return -self.maximum if self.signed else 0.0


def largest(values: NDArray[np.float64]) -> float:
    """What the darkest colour stands for, but for comparisons."""
    return float(np.abs(values).max())


def darkest(values: NDArray[np.float64]) -> float:
    """What the darkest colour stands for where methods are compared."""
    magnitudes = np.abs(values)
    return float(np.percentile(magnitudes, _PERCENTILE)) or float(magnitudes.max())


def scale_of(
    several: Sequence[ArrayLike], top: Callable[[NDArray[np.float64]], float] = largest
) -> Scale:
    """The scale that several maps or texts share: signed if a value of them is negative.

    Args:
        several: the values of each, at least one.
        top: of the values of one, what should be drawn darkest; the largest of them is.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in several]
    maximum = max(map(top, arrays))
    signed = any(bool((values < 0).any()) for values in arrays)
    return Scale(maximum, signed, cut=maximum < max(map(largest, arrays)))


def scales_of(several: Sequence[ArrayLike], *, shared: bool = False) -> list[Scale]:
    """One scale for each of several maps or texts: its own, or the one that all share."""
    if shared:
        return [scale_of(several)] * len(several)
    return [scale_of([values]) for values in several]


def nothing_of(label: str) -> str:
    """In place of a scale that goes from 0 to 0."""
    return f"{label}: 0 everywhere" if label else "0 everywhere"
