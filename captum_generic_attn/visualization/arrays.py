"""Converts attributions to NumPy arrays with one value per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def array_of(values: ArrayLike | Tensor) -> NDArray[Any]:
    """Convert an array or a tensor of any device and precision to an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def numbers(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Convert an array or a tensor to float64."""
    return array_of(values).astype(np.float64)


def merged(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Reduce an axis of channels or features: to their sum, or to one of them if all are equal.

    They are equal in our own method, which repeats a token's value in each of its elements.
    """
    first = values.take([0], axis)
    alike = bool((values == first).all())
    found: NDArray[np.float64] = first.squeeze(axis) if alike else values.sum(axis)
    return found
