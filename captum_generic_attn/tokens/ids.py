"""Token ids: an integer tensor of an activation's shape that says which token each element is of.

Ids mostly repeat along heads and features. There they are stored once: along such an axis the
tensor is an expanded view. That keeps ids small, and makes "do tokens differ along this axis" cheap
to answer. Only this module knows how repetition is stored.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


def repeats(ids: Tensor, axis: int) -> bool:
    """Whether ids are stored once along an axis. If not, they may still be equal there.

    Example:
        >>> ids = torch.tensor([[3], [4]]).expand(2, 5)
        >>> repeats(ids, 0), repeats(ids, 1), repeats(ids.clone(), 1)
        (False, True, False)
    """
    return ids.shape[axis] <= 1 or ids.stride(axis) == 0


def squeeze_expanded(ids: Tensor) -> Tensor:
    """The ids with each axis along which they are stored once narrowed to one element."""
    for axis in range(ids.ndim):
        if ids.stride(axis) == 0 and ids.shape[axis] > 1:
            ids = ids.narrow(axis, 0, 1)
    return ids


def squeeze_expanded_together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of one shape with each axis narrowed along which both are stored once."""
    for axis in range(a.ndim):
        if a.stride(axis) == b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return a, b


def varies(ids: Tensor, axis: int) -> bool:
    """Whether tokens differ along an axis. Padding counts as any token."""
    if repeats(ids, axis):
        return False
    ids = squeeze_expanded(ids)
    most = ids.amax(axis, keepdim=True)
    return bool(((ids != most) & (ids >= 0)).any())


def first_along(ids: Tensor, axis: int) -> Tensor:
    """The ids with one element along an axis: the token there, also if some are padding."""
    if repeats(ids, axis):
        return ids.narrow(axis, 0, min(1, ids.shape[axis]))
    return ids.amax(axis, keepdim=True)


def distinct_along(ids: Tensor, axis: int) -> Tensor:
    """The ids without those entries along an axis that repeat the entry before."""
    if repeats(ids, axis):
        return ids.narrow(axis, 0, min(1, ids.shape[axis]))
    lines = ids.movedim(axis, 0)
    small = squeeze_expanded(lines)
    changes = (small[1:] != small[:-1]).reshape(len(small) - 1, -1).any(-1)
    kept = torch.cat([torch.ones(1, dtype=torch.bool), changes])
    return lines[kept].movedim(0, axis)


def same_ids(a: Tensor, b: Tensor) -> bool:
    """Whether ids of one shape are equal."""
    if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    return torch.equal(*squeeze_expanded_together(a, b))


def fingerprint(ids: Tensor) -> Hashable:
    """A key that is equal for ids that are equal and stored alike, and for no others."""
    return ids.shape, ids.stride(), ids.dtype, squeeze_expanded(ids).numpy().tobytes()


def distinct_ids(rows: Tensor) -> Tensor:
    """`[n, m]` ids with each id once in its row, sorted, the rest -1; as narrow as may be."""
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
