"""What attributions are drawn from: arrays of tensors of any kind, one value for each token.

The figures of images, regions and words call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def array_of(values: ArrayLike | Tensor) -> NDArray[Any]:
    """An array of what may be a tensor of any device and precision."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def numbers(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    """The same as float64."""
    return array_of(values).astype(np.float64)


def merged(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Channels or features along an axis as one: their sum, unless they are all alike.

    They are in our own methods, where a token's undivided value stands in each of its elements.
    """
    first = values.take([0], axis)
    alike = bool((values == first).all())
    found: NDArray[np.float64] = first.squeeze(axis) if alike else values.sum(axis)
    return found
