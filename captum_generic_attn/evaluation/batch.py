"""What `images` and `texts` hand over: some examples, ready to be explained and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_generic_attn.metrics import Removal


@dataclass(frozen=True, eq=False)
class Rationale:
    """The words that people marked in a text.

    `words` says of each token which word it belongs to, `None` for special tokens; `marked` `[W]`
    is true for the words that count.
    """

    words: Sequence[int | None]
    marked: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of a data set.

    Attributes:
        first: the place of the first one in the data set.
        forward: the model, from `inputs` and `rest` to scores `[B, K]`.
        inputs: what is explained: images `[B, C, H, W]` or token ids `[B, N]`.
        rest: further arguments of the model.
        targets: `[B]`, the explained class of each.
        removal: by metric, what is removed of the inputs.
        right: of images with masks `[B, H, W]`, true in the right place.
        present: of texts `[B, N]`, true where a token is no padding.
        rationales: of texts, what people marked; `None` for texts without.
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
    """Whether the model judges each class by itself."""
    metrics: tuple[str, ...]
    """Those that are to be computed, of `scores.METRICS`."""
    batch_size: int
    """At most so many examples go through the model at once."""
    fractions: tuple[float, ...]
    """What is removed in positive and negative perturbation."""
    ks: tuple[int, ...]
    """How many words are taken in `token_f1`."""
    about: Mapping[str, Any]
    """Model and data, for the report."""
    notes: tuple[str, ...]
    """What a reader of the figures must know, found while the data were read."""

    def __len__(self) -> int: ...

    def batch(self, places: range) -> Batch:
        """The examples at these places."""


def drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """Which examples of a data set are evaluated: a random choice, in their order.

    The first ones would not do: they are of one class where folders are classes.

    Args:
        count: how many there are.
        limit: at most so many are taken; `None`: all.
        seed: of the choice.

    Example:
        >>> drawn(3, None, 0), len(drawn(100, 5, 0))
        ([0, 1, 2], 5)
    """
    if limit is None or limit >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:limit].tolist())
