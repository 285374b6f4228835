"""Extents: which elements of an input tokens were made of, along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOWHERE = 1 << 62, -1
"""The range of what was made of no element: any other range joined with it stays itself."""


class Extent(NamedTuple):
    """The elements of an input that tokens were made of, directly or through other tokens.

    `ranges` are `[*tokens, d, 2]`, the first and the last element along each of the `d` axes behind
    the batch. `along` has a `[n]` mask for each axis: True for elements that any of the tokens was
    made of.
    """

    ranges: Tensor
    along: tuple[Tensor, ...]

    def of(self, tokens: Tensor) -> Extent:
        """That of some of the tokens; `along` stays that of all."""
        return self._replace(ranges=self.ranges[tokens])


def sums_along(parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Along each axis, the elements at the sums of one place of each of `parts` `[n, d]`."""
    found = []
    for axis, size in enumerate(shape):
        places = torch.zeros(1, dtype=torch.long)
        for part in parts:
            steps = torch.unique(part[:, axis].long())
            places = torch.unique(places.unsqueeze(-1) + steps)
        found.append(torch.zeros(size, dtype=torch.bool).index_fill(0, places, True))
    return tuple(found)


def moved_along(along: Sequence[Tensor], steps: Tensor) -> tuple[Tensor, ...]:
    """Along each axis, the elements at each of `steps` `[n, d]` from some of those given."""
    moved = []
    for axis, read in enumerate(along):
        places = read.nonzero() + torch.unique(steps[:, axis].long())
        moved.append(torch.zeros_like(read).index_fill(0, places.flatten(), True))
    return tuple(moved)


def along_of_all(extents: Sequence[Extent]) -> tuple[Tensor, ...]:
    """Along each axis, the elements of any of these."""
    along = zip(*(extent.along for extent in extents), strict=True)
    return tuple(torch.stack(axis).any(0) for axis in along)


def hull(ranges: Tensor) -> Tensor:
    """`[n, d, 2]`, the ranges that hold all of `[n, m, d, 2]`."""
    return torch.stack([ranges[..., 0].amin(-2), ranges[..., 1].amax(-2)], -1)


def joined(extents: Sequence[Extent]) -> Extent:
    """The extent of tokens that were made of several parts."""
    return Extent(hull(torch.stack([e.ranges for e in extents], 1)), along_of_all(extents))
