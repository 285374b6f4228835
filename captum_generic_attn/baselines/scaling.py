"""Scaling of attention maps per example."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["minmax"] | None
"""`"minmax"`: the values of each example reach from 0 to 1; `None`: as they are."""


def min_max(maps: Tensor, examples: Tensor, counted: Tensor | None = None) -> Tensor:
    """Scale maps so that the values of each example reach from 0 to 1.

    Args:
        maps: `[G, Nq, Nk]`.
        examples: `[G]`, the example of each.
        counted: `[G, Nq, Nk]`, the entries among which minimum and maximum are taken; `None`: all.

    Returns:
        `[G, Nq, Nk]`: 0 for examples whose values are all equal, NaN for groups that hold values
        that are not finite.

    Example:
        >>> min_max(torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]]), torch.tensor([0, 1]))
        tensor([[[0., 1.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    owner = examples.to(maps.device)
    size = int(examples.max()) + 1
    ends = []
    for reduce, other in (("amin", torch.inf), ("amax", -torch.inf)):
        entries = maps if counted is None else maps.masked_fill(~counted, other)
        flat = entries.flatten(1)
        each = flat.amin(1) if reduce == "amin" else flat.amax(1)
        end = maps.new_full((size,), other).scatter_reduce(0, owner, each, reduce)
        ends.append(end[owner].view(-1, 1, 1))
    low, high = ends
    span = high - low
    known = torch.isfinite(span) & (span > 0)
    scaled = (maps - low) / torch.where(known, span, torch.ones_like(span))
    finite = maps.isfinite().flatten(1).all(1).view(-1, 1, 1)
    return torch.where(known, scaled, torch.zeros_like(scaled)).masked_fill(~finite, torch.nan)
