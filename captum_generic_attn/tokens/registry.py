"""The registry of token spaces: gives tokens their ids, and tells what is known of an id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_generic_attn.tokens.extent import Extent
from captum_generic_attn.tokens.identity_cache import IdentityCache
from captum_generic_attn.tokens.ids import squeeze_expanded
from captum_generic_attn.tokens.space import PADDING, Kind, Space


class SpaceRegistry:
    """The token spaces of one forward pass.

    `cache` holds of answers about token ids. `approximations` are operations that left
    positions their tokens by an approximation of the docs.
    """

    def __init__(self) -> None:
        self.cache = IdentityCache()
        self.approximations: dict[tuple[str, str], None] = {}
        self._spaces: list[Space] = []
        self._fixed: set[int] = set()
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    def __getitem__(self, index: int) -> Space:
        return self._spaces[index]

    def __iter__(self) -> Iterator[Space]:
        return iter(self._spaces)

    def approximate(self, kind: str, operation: str) -> None:
        """Note that an operation left positions their tokens by an approximation of the docs.

        Of kind `"neighbourhood"` (a position depends on tokens near it) or `"statistics"` (on all).
        """
        self.approximations[kind, operation] = None

    # -- opening spaces -------------------------------------------------------------------------

    def _open(
        self,
        size: int,
        examples: int,
        name: str,
        kind: Kind,
        coordinates: Tensor | None = None,
        parents: Tensor | None = None,
        shape: Sequence[int] | None = None,
        extent: Extent | None = None,
    ) -> Space:
        base = self._spaces[-1].stop if self._spaces else 0
        space = Space(
            len(self._spaces), base, size, examples, name, kind, coordinates, parents, shape, extent
        )
        self._spaces.append(space)
        self._table = None
        return space

    def of_input(self, name: str, shape: torch.Size, *, shared: bool = False) -> Tensor:
        """Number the elements of an input; returns a ids of its shape.

        With `shared`, the input is no batch: all examples share its tokens.
        """
        if shared:
            space = self._open(math.prod(shape), 0, name, "shared")
            return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)
        size = math.prod(shape[1:])
        space = self._open(size, shape[0], name, "element", shape=shape[1:])
        return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)

    def of_parameter(self, name: str, shape: torch.Size) -> Tensor:
        """Number the vectors of a parameter, its last axis being features; a ids of `shape`."""
        tokens = shape[:-1]
        space = self._open(math.prod(tokens), 0, name, "parameter")
        ids = torch.arange(space.base, space.stop, dtype=torch.int32).view(tokens)
        return ids.unsqueeze(-1).expand(shape)

    def of_table(self, name: str, index: Tensor) -> Tensor:
        """Number the rows of a parameter that `index` draws; a ids of its shape."""
        rows, drawn = torch.unique(index, return_inverse=True)
        space = self._open(len(rows), 0, name, "parameter")
        self._fixed.add(space.index)
        ids: Tensor = space.base + drawn
        return ids.to(torch.int32)

    def of_constants(self, name: str, constant: Tensor) -> Tensor:
        """Number the places `[B, ...]` that hold a constant in any example, -1 the others."""
        places = constant.any(0)
        space = self._open(int(places.sum()), 0, name, "parameter")
        ids = torch.full(places.shape, PADDING, dtype=torch.int32)
        ids[places] = torch.arange(space.base, space.stop, dtype=torch.int32)
        return ids.expand(constant.shape)

    def unknown(self, shape: torch.Size, reason: str) -> Tensor:
        """Number tokens whose origin was lost at the operation `reason`."""
        space = self._open(math.prod(shape), 0, reason, "unknown")
        return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)

    # -- what is known of ids -------------------------------------------------------------------

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Space index, example (-1: all) and local number of each id; all -1 for no token."""
        if self._table is None:
            self._table = (
                torch.tensor([s.base for s in self._spaces]),
                torch.tensor([max(s.size, 1) for s in self._spaces]),
                torch.tensor([s.examples == 0 for s in self._spaces]),
            )
        bases, sizes, shared = self._table
        ids = ids.long().contiguous()
        index = torch.bucketize(ids, bases, right=True) - 1
        index = torch.where(ids < 0, -1, index)
        inside = ids - bases[index]
        example = inside.div(sizes[index], rounding_mode="floor")
        example = torch.where(shared[index] | (ids < 0), -1, example)
        return index, example, torch.where(ids < 0, -1, inside % sizes[index])

    def indices(self, ids: Tensor) -> list[int]:
        """Indices of the spaces in `ids`, in order of first appearance."""
        return self.cache.of((ids,), "indices", lambda: self._indices(ids))

    def _indices(self, ids: Tensor) -> list[int]:
        index = self.locate(squeeze_expanded(ids).reshape(-1))[0]
        found = dict.fromkeys(index.tolist())
        found.pop(-1, None)
        return list(found)

    def several(self, ids: Tensor) -> bool:
        """Whether an example has more than one token among these."""
        ids = squeeze_expanded(ids)
        found = torch.unique(ids[ids >= 0])
        examples = torch.unique(self.locate(found)[1])
        return len(found) > len(examples)

    def fixed(self, ids: Tensor) -> bool:
        """Whether some of these tokens are rows of a table that no input chose."""
        return not self._fixed.isdisjoint(self.indices(ids))

    def lost(self, ids: Tensor) -> Tensor:
        """Whether the origin of each of these tokens was lost."""
        unknown = [s.index for s in self._spaces if s.kind == "unknown"]
        if not unknown:
            return torch.zeros_like(ids, dtype=torch.bool)
        return torch.isin(self.locate(ids)[0], torch.tensor(unknown))

    def token_axes(self, ids: Tensor) -> frozenset[int]:
        """The axes of a ids along which the tokens of one example differ."""
        return self.cache.of((ids,), "axes", lambda: self._axes(ids))[0]

    def example_axes(self, ids: Tensor) -> frozenset[int]:
        """The axes of a ids along which examples differ."""
        return self.cache.of((ids,), "axes", lambda: self._axes(ids))[1]

    def _axes(self, ids: Tensor) -> tuple[frozenset[int], frozenset[int]]:
        """The axes along which tokens differ within an example, and those along which examples do.

        No token counts as any token.
        """
        small = squeeze_expanded(ids)
        index, example, local = self.locate(small)
        bases = torch.tensor([space.base for space in self._spaces] or [0])
        tokens = torch.where(index < 0, -1, bases[index.clamp(min=0)] + local)

        def apart(numbers: Tensor) -> frozenset[int]:
            found = set()
            for axis in range(numbers.ndim):
                most = numbers.amax(axis, keepdim=True) if numbers.shape[axis] > 1 else numbers
                if bool(((numbers != most) & (numbers >= 0)).any()):
                    found.add(axis)
            return frozenset(found)

        examples = apart(example)
        each_once = {
            axis for axis in examples
            if bool((example.sort(axis).values.diff(dim=axis) != 0).all())
        }  # fmt: skip
        return apart(tokens) - each_once, examples


def distinct(index: Tensor) -> list[int]:
    """The spaces among indices, in order; -1 is none."""
    found: list[int] = torch.unique(index).tolist()
    return [i for i in found if i >= 0]
