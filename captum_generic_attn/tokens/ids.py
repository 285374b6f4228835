"""Plain functions of token ids, for `spaces` and for the planes of the capture.

Planes are mostly expanded views (stride 0 along heads and features), which keeps them small.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


class Memory:
    """What was answered of the very same tensors before, within one forward pass.

    The layers of a model do the same to the same tokens. Planes and ids are never written to, and
    are kept here together with the answer, so that an id of a tensor stays its own: nothing can go
    stale.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[object, Any]] = {}
        self._planes: dict[Hashable, Tensor] = {}

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, a pure function; arguments are tensors or can be hashed."""
        named = [id(value) if isinstance(value, Tensor) else value for value in args]
        key = function, *named, *kwargs.items()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = args, function(*args, **kwargs)
        found: T = known[1]
        return found

    def of(self, planes: tuple[Tensor, ...], question: Hashable, answer: Callable[[], T]) -> T:
        """The answer to a question about planes; who gives it is not kept."""
        key = question, *map(id, planes)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = planes, answer()
        found: T = known[1]
        return found

    def one(self, plane: Tensor) -> Tensor:
        """The first plane with these tokens in these places, which was asked questions before."""
        key = plane.shape, plane.stride(), plane.dtype, compact(plane).numpy().tobytes()
        return self._planes.setdefault(key, plane)


def hashable(value: object) -> Hashable:
    """Arguments of an operation as a question for `Memory`.

    Raises:
        TypeError: if a tensor is among them, which may hold something else the next time.
    """
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(hashable, value)
    if isinstance(value, Mapping):
        return tuple((key, hashable(item)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, Tensor):
        raise TypeError("a tensor is no question")
    hash(value)
    return value


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
