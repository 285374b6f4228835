"""Token spaces: every token that a forward pass creates gets a number, and knows its origin.

The capture opens a space when tokens are born (an embedding, a patch convolution, a parameter
that joins the sequence) and carries *planes*: integer tensors that say of each element of an
activation which token it belongs to. Planes live on the CPU whatever the model's device is, so
that following tokens never waits for an accelerator.

Ids of one space are `base + example * size + local`; tokens of a parameter are shared by all
examples and have `example = -1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PADDING = -1
"""Plane value of elements that belong to no token: padding and constants."""
FOREIGN = -2
"""Plane value of elements that came from outside the forward pass, such as a filled cache."""

Kind = Literal["element", "token", "parameter", "unknown"]


@dataclass(frozen=True, eq=False)
class Space:
    """Tokens (or, of kind "element", the raw elements of an input) that were born together.

    `coordinates` is `[size, d]`: the centre of each token in the non-batch axes of the input named
    `name`, or `None` where it cannot be told. `births` are the attention calls that had already
    acted on the tokens that this space was made of: not empty means tokens were merged or pooled
    between attention calls.
    """

    index: int
    base: int
    size: int
    examples: int
    name: str
    kind: Kind
    coordinates: Tensor | None = None
    births: frozenset[int] = frozenset()

    @property
    def stop(self) -> int:
        """The first id after this space."""
        return self.base + self.size * max(self.examples, 1)


class TokenSpaces:
    """The register of one forward pass: spaces, and which of their tokens are the same token."""

    def __init__(self) -> None:
        self._spaces: list[Space] = []
        self._same: dict[tuple[int, int], Tensor] = {}
        self._attended: set[int] = set()
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    def __getitem__(self, index: int) -> Space:
        return self._spaces[index]

    def __iter__(self) -> Iterator[Space]:
        return iter(self._spaces)

    def _open(
        self,
        size: int,
        examples: int,
        name: str,
        kind: Kind,
        coordinates: Tensor | None = None,
        births: frozenset[int] = frozenset(),
    ) -> Space:
        base = self._spaces[-1].stop if self._spaces else 0
        space = Space(len(self._spaces), base, size, examples, name, kind, coordinates, births)
        self._spaces.append(space)
        self._table = None
        return space

    def of_input(self, name: str, shape: torch.Size) -> Tensor:
        """Number the elements of an input; returns a plane of its shape."""
        size = math.prod(shape[1:])
        grid = [torch.arange(n, dtype=torch.float64) for n in shape[1:]]
        coordinates = (
            torch.stack([c.reshape(-1) for c in torch.meshgrid(*grid, indexing="ij")], -1)
            if grid
            else torch.zeros(1, 0, dtype=torch.float64)
        )
        space = self._open(size, shape[0], name, "element", coordinates)
        return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)

    def of_parameter(self, name: str, shape: torch.Size) -> Tensor:
        """Number the vectors of a parameter, its last axis being features; a plane of `shape`."""
        tokens = shape[:-1]
        space = self._open(math.prod(tokens), 0, name, "parameter")
        ids = torch.arange(space.base, space.stop, dtype=torch.int32).view(tokens)
        return ids.unsqueeze(-1).expand(shape)

    def unknown(self, shape: torch.Size, reason: str) -> Tensor:
        """Number tokens whose origin was lost at the operation `reason`."""
        space = self._open(math.prod(shape), 0, reason, "unknown")
        return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)

    def born(
        self, parents: Tensor, coordinates: Tensor | None, births: frozenset[int]
    ) -> Tensor | None:
        """Open a space with one token for each entry of `parents`.

        Args:
            parents: `[*tokens]`, the id of one (any) parent of each new token; it tells the input
                and the example that the token belongs to.
            coordinates: `[size, d]` centres in that input of one example's tokens, in their order,
                or `None` if unknown.
            births: the attention calls that the parents had been through.

        Returns:
            A plane of the shape of `parents`; `None` if the tokens are not spread evenly over the
            examples of one input, so that they cannot be numbered.
        """
        flat = parents.reshape(-1).long()
        known = flat[flat >= 0]
        if not len(known):
            return None
        index, example, _ = self.locate(flat)
        source = self[int(index[flat >= 0][0])]
        if bool((index != source.index).any()):
            return None
        examples = max(source.examples, 1)
        if len(flat) % examples:
            return None
        size = len(flat) // examples
        order = torch.argsort(example, stable=True)
        if bool((example[order].view(examples, size) != example[order][::size, None]).any()):
            return None
        if coordinates is not None and len(coordinates) != size:
            return None
        kind: Kind = "token" if source.examples else "parameter"
        for space in self._spaces:
            if (
                space.kind == kind == "token"
                and space.index not in self._attended
                and coordinates is not None
                and space.coordinates is not None
                and (space.size, space.name, space.births) == (size, source.name, births)
                and coordinates.shape[-1] > 1
                and torch.equal(space.coordinates, coordinates)
            ):
                break  # the same patches, read again: a stem's shortcut
        else:
            space = self._open(size, source.examples, source.name, kind, coordinates, births)
        ids = torch.empty_like(flat)
        ids[order] = torch.arange(space.base, space.stop)
        return ids.to(torch.int32).view(parents.shape)

    def born_of_rows(self, parents: Tensor, births: frozenset[int]) -> Tensor | None:
        """Open a space with one token for each row of parents: `[*tokens, m]` to `[*tokens]`."""
        most = parents.amax(-1)
        least = torch.where(parents < 0, most.unsqueeze(-1), parents).amin(-1)
        if not torch.equal(self.locate(most)[1], self.locate(least)[1]):
            return None
        example = self.locate(most.reshape(-1))[1]
        first = example == example.max()
        rows = parents.reshape(-1, parents.shape[-1])[first]
        centres = self.coordinates(torch.where(rows < 0, most.reshape(-1)[first, None], rows))
        if centres is None:
            return self.born(most, None, births)
        weight = (rows >= 0).unsqueeze(-1).to(centres.dtype)
        mean = (centres * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        mean = mean.mul(4096).round().div(4096)  # sums in another order must give the same centre
        return self.born(most, mean, births)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Space index, example (-1: all) and local number of each id; all -1 for no token."""
        if self._table is None:
            self._table = (
                torch.tensor([s.base for s in self._spaces]),
                torch.tensor([max(s.size, 1) for s in self._spaces]),
                torch.tensor([s.examples == 0 for s in self._spaces]),
            )
        bases, sizes, shared = self._table
        ids = ids.long()
        index = torch.bucketize(ids, bases, right=True) - 1
        index = torch.where(ids < 0, -1, index)
        inside = ids - bases[index]
        example = inside.div(sizes[index], rounding_mode="floor")
        example = torch.where(shared[index] | (ids < 0), -1, example)
        return index, example, torch.where(ids < 0, -1, inside % sizes[index])

    def coordinates(self, ids: Tensor) -> Tensor | None:
        """Centres `[*ids, d]` of tokens that all come from one input, else `None`."""
        index, _, local = self.locate(ids)
        first = int(index.reshape(-1)[0]) if ids.numel() else -1
        if first < 0 or bool((index != first).any()):
            return None
        centres = self[first].coordinates
        return None if centres is None else centres[local]

    def attend(self, ids: Tensor) -> None:
        """Note that an attention call reads these tokens: later births are other tokens."""
        self._attended.update(self.indices(ids))

    def indices(self, ids: Tensor) -> list[int]:
        """Indices of the spaces in `ids`, in order of first appearance."""
        index = self.locate(ids.reshape(-1))[0]
        found = dict.fromkeys(index.tolist())
        found.pop(-1, None)
        return list(found)

    def same(self, kept: Tensor, absorbed: Tensor) -> None:
        """Note that two planes of one shape were summed: `absorbed` lives on as `kept`."""
        for axis in range(kept.ndim):
            if kept.stride(axis) == absorbed.stride(axis) == 0:
                kept, absorbed = kept.narrow(axis, 0, 1), absorbed.narrow(axis, 0, 1)
        to, _, to_local = self.locate(kept.reshape(-1))
        of, example, of_local = self.locate(absorbed.reshape(-1))
        for a in set(of.tolist()):
            for k in set(to[of == a].tolist()):
                if a < 0 or k < 0 or a == k or (a, k) in self._same or (k, a) in self._same:
                    continue
                pick = (of == a) & (to == k) & (example == example[of == a].min())
                table = torch.full((self[a].size,), -1, dtype=torch.long)
                table[of_local[pick]] = to_local[pick]
                self._same[a, k] = table

    def absorbed_into(self, space: Space) -> list[tuple[Space, Tensor]]:
        """Spaces summed into this one, each with `[size]` local numbers in this space or -1."""
        found: dict[int, Tensor] = {space.index: torch.arange(space.size)}
        frontier = [space.index]
        while frontier:
            k = frontier.pop()
            for (a, into), table in self._same.items():
                if into == k and a not in found:
                    found[a] = torch.where(table >= 0, found[k][table.clamp(min=0)], -1)
                    frontier.append(a)
        return [(self[i], table) for i, table in found.items() if i != space.index]
