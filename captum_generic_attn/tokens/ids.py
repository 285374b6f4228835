"""Plain functions of token ids, for `spaces` and for the planes of the capture.

Planes are mostly expanded views (stride 0 along heads and features), which keeps them small.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compact(plane: Tensor) -> Tensor:
    """The plane with every repeated (stride 0) axis narrowed to one element."""
    for axis in range(plane.ndim):
        if plane.stride(axis) == 0 and plane.shape[axis] > 1:
            plane = plane.narrow(axis, 0, 1)
    return plane


def compact_together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two planes of one shape with every axis narrowed along which both are repeated."""
    for axis in range(a.ndim):
        if a.stride(axis) == b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return a, b


def distinct_ids(rows: Tensor) -> Tensor:
    """`[n, m]` ids with every id once in its row, sorted, the rest -1; as narrow as may be."""
    ranked = rows.sort(-1, descending=True).values
    repeated = torch.zeros_like(ranked, dtype=torch.bool)
    repeated[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    ranked = torch.where(repeated | (ranked < 0), -1, ranked).sort(-1, descending=True).values
    return ranked[:, : max(int((ranked >= 0).sum(-1).max()), 1)]


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows, the place of one of each, and which of them each row is."""
    distinct, member = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.empty(len(distinct), dtype=torch.long)
    first[member.flip(0)] = torch.arange(len(rows) - 1, -1, -1)
    return distinct, first, member
