"""Bootstrap confidence intervals over independent examples.

The metrics return one value per example; `estimate` aggregates them to a statistic with a
confidence interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from captum_generic_attn.extras import needed

Statistic = Callable[..., Any]
"""Maps arrays, whose last axis is the examples, and `axis=-1` to one value of the
statistic each.
"""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its confidence interval.

    `value` is the statistic over all examples, `low` and `high` are the ends of the interval, and
    `count` is the number of independent examples.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def margin(self) -> float:
        """Half the width of the interval, which need not be symmetric around the value."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, n = {self.count})"


def mean(values: NDArray[np.float64], axis: int = -1) -> Any:
    """The mean along an axis, the default statistic of `estimate`."""
    return values.mean(axis)


def ratio(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], axis: int = -1
) -> Any:
    """The ratio of two sums, for statistics of a whole data set.

    Example:
        >>> print(estimate([1, 0, 2], [2, 1, 2], statistic=ratio, resamples=100))
        0.6 (0 to 1, n = 3)
    """
    return numerators.sum(axis) / denominators.sum(axis)


def estimate(
    *values: ArrayLike | torch.Tensor,
    statistic: Statistic = mean,
    groups: Sequence[Any] | ArrayLike | torch.Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic over examples, with a confidence interval from the percentile bootstrap.

    Args:
        values: one or more arrays with one value per example; they are resampled together.
        statistic: computes the statistic of the arrays along `axis`: `mean`, `ratio`, or a function
            of your own.
        groups: labels of examples that belong together (explanations of one image): groups are
            resampled instead of examples. Only for the mean of a single array.
        confidence: confidence level of the interval, in 0 … 1.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap; the same seed gives the same interval.

    Returns:
        An `Estimate`. For a single example, the interval is the value itself.

    Raises:
        ValueError: if there is no value, one is NaN or infinite, lengths differ, an option is out
            of range, or the statistic is undefined for a bootstrap sample.

    Source: B. Efron, R. Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.

    Example:
        >>> hits = [1, 1, 0, 1, 0, 1, 1, 1]
        >>> print(estimate(hits))
        0.75 (0.375 to 1, n = 8)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: it must be between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: it must be at least 1")
    arrays = _checked([_array(part) for part in values])
    if groups is not None:
        if len(arrays) != 1 or statistic is not mean:
            raise ValueError("groups= can be used only for the mean of a single array of values")
        arrays, statistic = _grouped(arrays[0], groups), ratio
    value = float(statistic(*arrays, axis=-1))
    count = arrays[0].size
    if count == 1:
        return Estimate(value, value, value, 1)
    bootstrap = needed("scipy.stats").bootstrap
    interval = bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, 2**22 // count),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    found = Estimate(value, float(interval.low), float(interval.high), count)
    if not np.isfinite([found.value, found.low, found.high]).all():
        raise ValueError(
            f"the statistic is {found.value} over all examples, but undefined for some bootstrap "
            "samples (a sum of denominators is 0?): there is no interval"
        )
    return found


def _checked(arrays: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Check that each array has one finite value per example."""
    if not arrays or not arrays[0].size:
        raise ValueError("there is no value to estimate from")
    lengths = {array.shape for array in arrays}
    if len(lengths) > 1 or arrays[0].ndim != 1:
        raise ValueError(
            "each array needs one value per example; these have the shapes "
            f"{[array.shape for array in arrays]}"
        )
    for array in arrays:
        if not np.isfinite(array).all():
            raise ValueError(
                f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite: "
                "leave these examples out, and report how many"
            )
    return arrays


def _array(values: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _grouped(
    values: NDArray[np.float64], groups: Sequence[Any] | ArrayLike | torch.Tensor
) -> list[NDArray[np.float64]]:
    """The sum and the number of values in each group."""
    labels = groups.cpu().numpy() if isinstance(groups, torch.Tensor) else np.asarray(groups)
    if labels.shape != values.shape:
        raise ValueError(f"{values.size} values need as many groups, not {labels.shape}")
    _, index = np.unique(labels, return_inverse=True)
    return [
        np.bincount(index, weights=values).astype(np.float64),
        np.bincount(index).astype(np.float64),
    ]
