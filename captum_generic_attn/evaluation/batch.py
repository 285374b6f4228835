"""Batches of examples, and the interface of data sets (`images`, `texts`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_generic_attn.metrics import Removal


@dataclass(frozen=True, eq=False)
class Rationale:
    """The words that annotators marked in a text.

    `words` holds the index of each token's word, `None` for special tokens; `marked` `[W]` is true
    for the marked words.
    """

    words: Sequence[int | None]
    marked: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of a data set.

    Attributes:
        first: index of the first example in the data set.
        forward: the model, from `inputs` and `rest` to scores `[B, K]`.
        inputs: the explained inputs: images `[B, C, H, W]` or token ids `[B, N]`.
        rest: further arguments of the model.
        targets: `[B]`, the explained class of each example.
        removal: the `Removal` of each metric.
        right: for images with masks, `[B, H, W]`, true in the annotated place.
        present: for texts, `[B, N]`, true where a token is not padding.
        rationales: for texts, the rationale of each; `None` for texts without one.
    """

    first: int
    forward: Callable[..., Tensor]
    inputs: Tensor
    rest: tuple[Tensor, ...]
    targets: Tensor
    removal: Callable[[str], Removal]
    right: Tensor | None = None
    present: Tensor | None = None
    rationales: Sequence[Rationale | None] = ()


class Examples(Protocol):
    """A data set with its model: `ImageSet`, `TextSet`."""

    multi_label: bool
    """Whether the model scores each class independently."""
    metrics: tuple[str, ...]
    """The metrics to compute, by their names in `scores.METRICS`."""
    batch_size: int
    """The maximum number of examples per forward pass."""
    fractions: tuple[float, ...]
    """The fractions that positive and negative perturbation remove."""
    ks: tuple[int, ...]
    """The numbers of selected words in `token_f1`."""
    about: Mapping[str, Any]
    """Model and data, for the report."""
    notes: tuple[str, ...]
    """Remarks for the reader of the results, from reading the data."""

    def __len__(self) -> int: ...

    def batch(self, places: range) -> Batch:
        """The examples at these indices."""


def drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """Draw the examples of a data set to evaluate: a random sample, in ascending order.

    The first examples would be of a single class if folders are classes.

    Args:
        count: the number of examples in the data set.
        limit: the maximum number of examples in the sample; `None`: all.
        seed: seed of the sample.

    Example:
        >>> drawn(3, None, 0), len(drawn(100, 5, 0))
        ([0, 1, 2], 5)
    """
    if limit is None or limit >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:limit].tolist())
