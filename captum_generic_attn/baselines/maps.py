"""Maps that the baselines make of a call, and how they scale them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.relevance.attention_maps import AttentionMap


@dataclass(frozen=True, eq=False)
class LateMap(AttentionMap):
    """A map that is computed when it is asked for, when all of the backward pass is known."""

    compute: Callable[[], Tensor]

    def dense(self) -> Tensor:  # noqa: D102
        return self.compute()

    def of_rows(self, rows: Tensor) -> Tensor:  # noqa: D102
        return rows @ self.dense()

    def of_columns(self, columns: Tensor) -> Tensor:  # noqa: D102
        return self.dense() @ columns

    def kept(self) -> AttentionMap:  # noqa: D102
        return self


def min_max(maps: Tensor, examples: Tensor, counted: Tensor | None = None) -> Tensor:
    """Maps scaled so that each example's values reach from 0 to 1; 0 where they are all alike, NaN
    where some are not finite.

    Args:
        maps: `[G, Nq, Nk]`.
        examples: `[G]`, whose each is.
        counted: `[G, Nq, Nk]`, which entries the least and the greatest are taken of; `None`: all.

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
