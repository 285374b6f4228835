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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.tokens.ids import (
    Memory,
    compact,
    compact_together,
    distinct_ids,
    unique_rows,
)

PADDING = -1
"""Plane value of elements that belong to no token: padding and constants."""
FOREIGN = -2
"""Plane value of elements that came from outside the forward pass, such as a filled cache."""
STALE = -3
"""Plane value of padding that has been through attention as a query."""

NOWHERE = 1 << 62, -1
"""The range of what was made of no element: any other range joined with it stays itself."""

Kind = Literal["element", "token", "parameter", "shared", "unknown"]


class Extent(NamedTuple):
    """The elements of an input that tokens were made of, be it through other tokens.

    `ranges` are `[*tokens, d, 2]`, the first and the last element along each of the `d` axes behind
    the batch; `along` are `[n]` for each axis, True for the elements that some of the tokens was
    made of.
    """

    ranges: Tensor
    along: tuple[Tensor, ...]

    def of(self, tokens: Tensor) -> Extent:
        """That of some of the tokens, as far as it is known of each by itself."""
        return self._replace(ranges=self.ranges[tokens])


@dataclass(frozen=True, eq=False)
class Space:
    """Tokens (or, of kind "element", the raw elements of an input) that were born together.

    `coordinates` is `[size, d]`: the centre of each token in the non-batch axes of the input named
    `name`, or `None` where it cannot be told. `parents` is `[examples, size, m]`, the ids of the
    tokens that each token was merged or pooled from (-1 fills up), or `None` where the tokens were
    made of elements of an input. `shape` is that of an input without its batch, for elements that
    lie where they are in it.
    """

    index: int
    base: int
    size: int
    examples: int
    name: str
    kind: Kind
    coordinates: Tensor | None = None
    parents: Tensor | None = None
    shape: Sequence[int] | None = None
    extent: Extent | None = None

    def at(self, local: Tensor) -> Tensor | None:
        """Centres `[*local, d]` of some of the tokens."""
        if self.shape is None:
            return None if self.coordinates is None else self.coordinates[local]
        if not self.shape:
            return torch.zeros(*local.shape, 0, dtype=torch.float64)
        return torch.stack(torch.unravel_index(local, self.shape), -1).double()

    def reads(self, local: Tensor) -> Tensor | None:
        """Ranges `[*local, d, 2]` of the elements that some of the tokens were made of."""
        if self.shape is None:
            return None if self.extent is None else self.extent.ranges[local]
        axes = torch.unravel_index(local, self.shape) if self.shape else ()
        places = torch.stack(axes, -1) if axes else local.new_zeros(*local.shape, 0)
        return torch.stack([places, places], -1)

    @property
    def stop(self) -> int:
        """The first id after this space."""
        return self.base + self.size * max(self.examples, 1)


class TokenSpaces:
    """The register of one forward pass: spaces, and which of their tokens are the same token."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._spaces: list[Space] = []
        self._same: dict[tuple[int, int], Tensor] = {}
        self._origins: dict[str, str] = {}
        self._read: set[int] = set()
        self._asked: set[int] = set()
        self._made_of: dict[int, list[int]] = {}
        self._fixed: set[int] = set()
        self._table: tuple[Tensor, Tensor, Tensor] | None = None
        self.approximations: dict[tuple[str, str], None] = {}

    def approximate(self, kind: str, operation: str) -> None:
        """Note that an operation left positions their tokens by an approximation of the docs.

        Of kind `"neighbourhood"` (a position depends on tokens near it) or `"statistics"` (on all).
        """
        self.approximations[kind, operation] = None

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
        """Number the elements of an input; returns a plane of its shape.

        With `shared`, the input is no batch: all examples share its tokens.
        """
        if shared:
            space = self._open(math.prod(shape), 0, name, "shared")
            return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)
        size = math.prod(shape[1:])
        space = self._open(size, shape[0], name, "element", shape=shape[1:])
        return torch.arange(space.base, space.stop, dtype=torch.int32).view(shape)

    def of_picture(
        self, plane: Tensor, centres: Tensor, extent: Extent, shape: torch.Size
    ) -> Tensor:
        """Number the elements of a resized picture `plane` `[B, C, *spatial]`.

        `centres` `[B, *spatial, d]` and `extent` are those of its first channel. Several rows of
        the batch may be frames of one example.
        """
        source = self[self.indices(plane)[0]]
        channels = self.coordinates(plane[0].flatten(1)[:, 0])
        assert channels is not None  # noqa: S101 - a picture's elements lie somewhere
        apart = (channels - channels[0]).unsqueeze(1)  # [C, 1, d]: channels differ in their axis
        _, example, local = self.locate(plane.flatten(1).amax(1))
        frames, frame = torch.unique(local, return_inverse=True)
        first = torch.stack([(frame == f).nonzero()[0, 0] for f in range(len(frames))])
        coordinates = centres[first].flatten(1, -2).unsqueeze(1) + apart  # [T, C, n, d]
        ranges = extent.ranges[first].flatten(1, -3).unsqueeze(1) + apart.long().unsqueeze(-1)
        size = math.prod(shape[1:])
        space = self._open(
            size * len(frames), source.examples, source.name, "element", coordinates.flatten(0, 2),
            extent=Extent(ranges.flatten(0, 2), moved_along(extent.along, apart[:, 0])),
        )  # fmt: skip
        start = space.base + example.clamp(min=0) * space.size + frame * size
        ids: Tensor = start.unsqueeze(-1) + torch.arange(size)
        return ids.to(torch.int32).view(shape)

    def of_parameter(self, name: str, shape: torch.Size) -> Tensor:
        """Number the vectors of a parameter, its last axis being features; a plane of `shape`."""
        tokens = shape[:-1]
        space = self._open(math.prod(tokens), 0, name, "parameter")
        ids = torch.arange(space.base, space.stop, dtype=torch.int32).view(tokens)
        return ids.unsqueeze(-1).expand(shape)

    def of_table(self, name: str, index: Tensor) -> Tensor:
        """Number the rows of a parameter that `index` draws; a plane of its shape."""
        rows, drawn = torch.unique(index, return_inverse=True)
        space = self._open(len(rows), 0, name, "parameter")
        self._fixed.add(space.index)
        ids: Tensor = space.base + drawn
        return ids.to(torch.int32)

    def fixed(self, ids: Tensor) -> bool:
        """Whether some of these tokens are rows of a table that no input chose."""
        return not self._fixed.isdisjoint(self.indices(ids))

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

    def lost(self, ids: Tensor) -> Tensor:
        """Whether the origin of each of these tokens was lost."""
        unknown = [s.index for s in self._spaces if s.kind == "unknown"]
        if not unknown:
            return torch.zeros_like(ids, dtype=torch.bool)
        return torch.isin(self.locate(ids)[0], torch.tensor(unknown))

    def born(
        self, parents: Tensor, centres: Tensor | None, extent: Extent | None = None, *,
        again: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Open a space with one token for each row of parents.

        Args:
            parents: `[*tokens, m]` ids of the elements or tokens that each is made of, negative for
                none. Of elements some will do: they tell the input, the example and the place.
            centres: `[tokens, d]` centres in the input, or `None` if unknown.
            extent: of the elements that they are made of, ranges `[tokens, d, 2]`; `None`: that of
                their parents.
            again: whether tokens with these centres that no call has read yet are these: features
                that are projected once for queries and once for keys.

        Returns:
            A plane of shape `[*tokens]`, padding where a row has no parents; `None` if the tokens
            are not spread evenly over the examples. Tokens of the same parents are the same.
        """
        shape = parents.shape[:-1]
        rows = parents.reshape(-1, parents.shape[-1]).long()
        alive = (rows >= 0).any(-1)
        rows = rows[alive]
        sources = [self[i] for i in self.indices(rows)]
        raw = any(s.kind in ("element", "shared") for s in sources)
        if not raw and len(shape) > 1 and len(parents) > 1:
            distinct, first, member = unique_rows(parents.flatten(1))
            if len(distinct) < len(parents):  # heads that are pooled one by one
                if centres is not None:
                    centres = centres.view(len(parents), -1, centres.shape[-1])[first].flatten(0, 1)
                plane = self.born(parents[first], centres, again=again)
                return None if plane is None else plane[member]
        _, example, _ = self.locate(rows)
        if not sources or (len(sources) > 1 and (raw or any(s.kind == "unknown" for s in sources))):
            return None
        owner = example.amax(-1)
        if bool(((example >= 0) & (example != owner[:, None])).any()):
            return None  # made of several examples
        leader = torch.where(example == owner[:, None], rows, -1).amax(-1)
        source = self[int(self.locate(leader[:1])[0])]
        examples = max(source.examples, 1)
        if len(rows) % examples:
            return None
        size = len(rows) // examples
        order = torch.argsort(leader, stable=True)  # by example, then by place in the input
        owners = owner[order].view(examples, size)
        expected = torch.arange(examples) if source.examples else torch.tensor([-1])
        if bool((owners != expected[:, None]).any()):
            return None
        if centres is not None:
            placed = centres.flatten(0, -2)[alive][order]
            centres = placed.view(examples, size, placed.shape[-1])
            centres = centres[0] if bool((centres == centres[0]).all()) else None
        extent = None if centres is None else extent or self.extent(rows)
        if extent is not None:  # of all examples
            ranges = extent.ranges.flatten(0, -3)
            ranges = (ranges[alive] if len(ranges) == len(alive) else ranges)[order]
            ranges = ranges.view(examples, size, *ranges.shape[1:]).transpose(0, 1)
            extent = extent._replace(ranges=_hull(ranges))
        kind: Kind = "token" if source.examples else source.kind
        if raw:
            family = None
            space = self._unread(size, source.name, centres, extent) if again else None
        else:
            family = distinct_ids(rows[order]).view(examples, size, -1)
            space = self._sibling(family)
        if space is None:
            space = self._open(
                size, source.examples, source.name, kind, centres, family, extent=extent
            )
        ids = torch.empty_like(leader)
        ids[order] = torch.arange(space.base, space.stop)
        plane = torch.full((len(alive),), PADDING, dtype=torch.int32)
        plane[alive] = ids.to(torch.int32)
        return plane.view(shape)

    def _sibling(self, parents: Tensor) -> Space | None:
        """The space whose tokens have these parents."""
        for space in self._spaces:
            if space.parents is not None and torch.equal(space.parents, parents):
                return space
        return None

    def _unread(
        self, size: int, name: str, centres: Tensor | None, extent: Extent | None
    ) -> Space | None:
        """Tokens of an input with these centres that no attention call has read.

        They were made of these elements as well.
        """
        for space in self._spaces:
            if (
                space.kind == "token"
                and (space.size, space.name) == (size, name)
                and space.index not in self._read
                and centres is not None
                and space.coordinates is not None
                and torch.equal(space.coordinates, centres)
            ):
                if space.extent is not None and extent is not None:
                    both = _together([space.extent, extent])
                    space = self._spaces[space.index] = replace(space, extent=both)
                return space
        return None

    def read(self, ids: Tensor) -> None:
        """Note that an attention call reads these tokens: later births are other tokens."""
        self._read.update(self.indices(ids))

    def born_of_rows(self, parents: Tensor) -> Tensor | None:
        """Open a space with one token for each row of parents, centred among them.

        Args:
            parents: `[*tokens, m]` ids of elements or of tokens.

        Returns:
            A plane of shape `[*tokens]`, or `None`, as `born`.
        """
        rows = parents.reshape(-1, parents.shape[-1])
        alive = (rows >= 0).any(-1)
        most = rows.amax(-1)
        filled = torch.where(rows < 0, most.unsqueeze(-1), rows)[alive]
        index, example, local = self.locate(torch.stack([filled.amax(-1), filled.amin(-1)]))
        raw = any(self[i].kind in ("element", "shared") for i in _distinct(index))
        if raw and bool((index != index[0, 0]).any()):
            return self._born_of_inputs(parents)
        one_space = torch.equal(index[0], index[1]) and torch.equal(example[0], example[1])
        placed = None
        if one_space and len(filled):
            placed = self._places_of_rows(rows[alive], filled, local)
        centres = extent = None
        if placed is not None:
            centres = placed[0].new_zeros(len(rows), placed[0].shape[1])
            centres[alive], extent = placed
        if raw:
            if not one_space:
                return None
            elements = parents.shape[-1] > 1  # an embedding's integers are one each: never again
            return self.born(most.view(*parents.shape[:-1], 1), centres, extent, again=elements)
        return self.born(parents, centres, extent)

    def _born_of_inputs(self, parents: Tensor) -> Tensor | None:
        """As `born_of_rows`, of elements of several inputs that were joined before.

        A row of elements of several inputs is one token, that of the first.
        """
        index = self.locate(parents)[0]
        inputs = _distinct(index)
        if any(self[i].kind not in ("element", "shared") for i in inputs):
            return None
        together: Tensor | None = None
        for i in inputs:
            plane = self.born_of_rows(torch.where(index == i, parents, PADDING))
            if plane is None:
                return None
            if together is None:
                together = plane
                continue
            both = (together >= 0) & (plane >= 0)
            if bool(both.any()) and not self.same(together[both], plane[both]):
                return None
            together = torch.where(together >= 0, together, plane)
        return together

    def _places_of_lines(self, rows: Tensor) -> tuple[Tensor, Extent] | None:
        """As `_places_of_rows`, of rows that are each a straight line of evenly spaced elements."""
        if rows.shape[1] < 2:
            return None
        first, step = rows[:, :1], rows[0, 1] - rows[0, 0]
        if not torch.equal(rows, first + step * torch.arange(rows.shape[1], dtype=rows.dtype)):
            return None
        ends = self.coordinates(rows[:, [0, 1, -1]])
        source = self[int(self.locate(rows[:1, 0])[0])]
        if ends is None or source.shape is None:
            return None
        start, second, last = ends.unbind(1)
        # No line runs over an edge of the input: where it ends is as far as its steps reach.
        if not torch.equal(last, start + (rows.shape[1] - 1) * (second - start)):
            return None
        steps = torch.arange(rows.shape[1]).unsqueeze(-1) * (second - start)[0]
        extent = Extent(
            _hull(torch.stack([start, last], 1).long().unsqueeze(-1).expand(-1, -1, -1, 2)),
            sums_along([start, steps], source.shape),
        )
        return (start + last) / 2, extent

    def _places_of_rows(
        self, parents: Tensor, rows: Tensor, local: Tensor
    ) -> tuple[Tensor, Extent] | None:
        """Centres `[n, d]` and extent of tokens that are made of rows `[n, m]`.

        `parents` are the rows with -1 for none, `local` the numbers of their ends.
        """
        if (places := self._places_of_lines(parents)) is not None:
            return places
        same = self.locate(rows)[2] if bool((local >= 0).all()) else local[0, :, None]
        # Rows that hold the same elements of their examples have the same centre.
        _, first, member = unique_rows(same)
        centres, extent = self.coordinates(rows[first]), self.extent(rows[first])
        if centres is None or extent is None:
            return None
        present = parents.reshape(rows.shape)[first] >= 0
        weight = present.unsqueeze(-1).to(centres.dtype)
        whole = centres[present.all(-1)]
        if len(whole):  # rows at an edge, if they are like the others but for what sticks out
            middle = centres - (whole[0] - whole[0].mean(0))
            least = torch.where(weight > 0, middle, math.inf).amin(-2, keepdim=True)
            alike = ((middle == least) | (weight == 0)).all(-1).all(-1)
            centres = torch.where(alike[:, None, None], middle, centres)
        centres = (centres * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        centres = centres.mul(4096).round().div(4096)  # the order of sums must not matter
        return centres[member], extent.of(member)

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

    def lattice(self, lines: Tensor) -> tuple[Tensor, Tensor] | None:
        """How the elements of an input lie in it, if they are evenly spaced.

        Args:
            lines: `[B, *spatial]` ids, a map of each example.

        Returns:
            The position `[d]` of the first and the distances `[spatial axes, d]` of neighbours,
            alike in all examples; `None` if these are not elements, or in no such order.
        """
        space = self[max(int(self.locate(lines.flatten()[:1])[0]), 0)]
        if space.shape is None or len(lines) != space.examples or lines.numel() == 0:
            return None
        corner = (0,) * (lines.ndim - 1)
        first = int(lines[(0, *corner)]) - space.base
        expected = space.base + first + space.size * torch.arange(len(lines), dtype=lines.dtype)
        ends, seconds = [first], []
        for axis, n in enumerate(lines.shape[1:]):
            second = tuple(min(1, n - 1) if a == axis else 0 for a in range(lines.ndim - 1))
            step = int(lines[(0, *second)]) - space.base - first
            expected = expected.unsqueeze(-1) + step * torch.arange(n, dtype=lines.dtype)
            seconds.append(first + step)
            ends.append(first + step * (n - 1))
        if not torch.equal(lines, expected):
            return None
        places = space.at(torch.tensor([*ends, *seconds]))
        assert places is not None  # noqa: S101 - elements of an input lie somewhere
        origin, last_ones, second_ones = places[0], places[1 : len(ends)], places[len(ends) :]
        # No line runs over an edge of the input: where it ends is as far as its steps reach.
        counts = torch.tensor(lines.shape[1:]).unsqueeze(-1) - 1
        slopes = second_ones - origin
        return (origin, slopes) if torch.equal(last_ones, origin + counts * slopes) else None

    def coordinates(self, ids: Tensor) -> Tensor | None:
        """Centres `[*ids, d]` of tokens that all come from one input, else `None`."""
        index, _, local = self.locate(ids)
        first = int(index.reshape(-1)[0]) if ids.numel() else -1
        if first < 0 or bool((index != first).any()):
            return None
        return self[first].at(local)

    def extent(self, rows: Tensor) -> Extent | None:
        """The elements of one input that tokens were made of whose parents `[n, m]` are given.

        `None` if they come from several inputs, or it cannot be told. Parameters say nothing.
        """
        index, _, local = self.locate(rows)
        sources = [space for i in _distinct(index) if (space := self[i]).kind != "parameter"]
        if not sources or any(space.name != sources[0].name for space in sources):
            return None
        found = []
        for space in sources:
            mine = index == space.index
            ranges = space.reads(local.clamp(0, space.size - 1))
            if ranges is None:
                return None
            if space.extent is not None:
                along = space.extent.along
            else:
                assert space.shape is not None  # noqa: S101 - elements that lie where they are
                along = sums_along([ranges[mine][..., 0]], space.shape)
            ranges = torch.where(mine[..., None, None], ranges, torch.tensor(NOWHERE))
            found.append(Extent(_hull(ranges), along))
        return _together(found)

    def indices(self, ids: Tensor) -> list[int]:
        """Indices of the spaces in `ids`, in order of first appearance."""
        return self.memory.of((ids,), "indices", lambda: self._indices(ids))

    def _indices(self, ids: Tensor) -> list[int]:
        index = self.locate(compact(ids).reshape(-1))[0]
        found = dict.fromkeys(index.tolist())
        found.pop(-1, None)
        return list(found)

    def several(self, ids: Tensor) -> bool:
        """Whether an example has more than one token among these."""
        ids = compact(ids)
        found = torch.unique(ids[ids >= 0])
        examples = torch.unique(self.locate(found)[1])
        return len(found) > len(examples)

    def ask(self, queries: Tensor) -> None:
        """Note that an attention call adds to these tokens: they have a history of their own."""
        self._asked.update(self.indices(queries))

    def made_of(self, index: int) -> list[int]:
        """The spaces that the tokens of a space were merged from, themselves excluded."""
        if index not in self._made_of:
            parents = self[index].parents
            self._made_of[index] = [] if parents is None else self.indices(parents)
        return self._made_of[index]

    def _histories(self, indices: Iterable[int]) -> set[int]:
        """The spaces that an attention call added to, among some and what they were merged from."""
        found, frontier = set(indices), list(indices)
        while frontier:
            new = [i for i in self.made_of(frontier.pop()) if i not in found]
            found.update(new)
            frontier += new
        return found & self._asked

    def nothing_new(self, absorbed: Tensor, kept: Tensor) -> bool:
        """Whether tokens may live on as others, place by place: these know all that they know.

        Attention added nothing to tokens that may, and either to none of those that they were
        merged from, or these are among those that the others were merged from.
        """
        of = self.indices(absorbed)
        if self._asked & set(of):
            return False
        return not self._histories(of) or self.contains(kept, absorbed)

    def contains(self, whole: Tensor, part: Tensor, *, at_home: bool = False) -> bool:
        """Whether, place by place, a token was made of all that another was made of.

        Args:
            whole: `[n]` ids of tokens.
            part: `[n]` ids of tokens at the same places, negative for none.
            at_home: whether tokens that live on as others, or were born twice, count as those.
        """
        pairs = torch.unique(torch.stack([whole.reshape(-1), part.reshape(-1)]), dim=1)
        known, own, needed = self._made_from(*pairs.unbind())
        left = ~(_among(own, known) | ((needed >= 0).any(-1) & _among(needed, known)))
        if not at_home or not bool(left.any()):
            return not bool(left.any())
        known, own, needed = (self._home_of(ids[left]) for ids in (known, own, needed))
        return bool((_among(own, known) | ((needed >= 0).any(-1) & _among(needed, known))).all())

    def _made_from(self, whole: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `contains` compares, `[n, *]` each.

        The tokens `whole` with those that they were merged from, the tokens `part`, and what these
        were merged from.
        """
        parents = []
        for ids in (whole, part):
            index, example, local = self.locate(ids)
            layers = [ids.new_full((len(ids), 1), -1, dtype=torch.long)]
            for i in _distinct(index):
                table = self[i].parents
                if table is not None:
                    owners = example.clamp(0, len(table) - 1)
                    rows = table[owners, local.clamp(0, table.shape[1] - 1)].long()
                    layers.append(torch.where((index == i).unsqueeze(-1), rows, -1))
            parents.append(torch.cat(layers, 1))
        known = torch.cat([whole.long().unsqueeze(-1), parents[0]], 1)
        return known, part.long().unsqueeze(-1), parents[1]

    def belong(self, keys: Tensor, values: Tensor) -> bool:
        """Whether, place by place, a value was made of nothing but what its key was made of.

        Values that are no tokens of an input (padding, constants, parameters) belong to any key,
        and where there is no key, any value may stand.
        """
        index = self.locate(values)[0]
        learned = [s.index for s in self._spaces if s.kind == "parameter"]
        pick = (values >= 0) & (keys >= 0) & (values != keys)
        pick &= ~torch.isin(index, torch.tensor(learned))
        return not bool(pick.any()) or self.contains(keys[pick], values[pick], at_home=True)

    def _home_of(self, ids: Tensor) -> Tensor:
        """The tokens that these live on as: those that they were added to, or were born as before.

        Tokens that were born twice from the same places of an input (a projection for keys, one for
        values) are one.
        """
        while True:
            index, example, local = self.locate(ids)
            moved = ids
            for i in _distinct(index):
                mine = index == i
                for (a, k), table in self._same.items():
                    if a == i:
                        owners = example.clamp(0, len(table) - 1)
                        places = table[owners, local.clamp(0, table.shape[1] - 1)]
                        home = self[k]
                        owner = example if home.examples else torch.zeros_like(example)
                        there = home.base + owner.clamp(min=0) * home.size + places
                        moved = torch.where(mine & (places >= 0), there, moved)
                if (twin := self._twin(self[i])) is not None:
                    there = ids - self[i].base + twin.base
                    moved = torch.where(mine & (moved == ids), there, moved)
            if moved is ids or torch.equal(moved, ids):
                return ids
            ids = moved

    def _twin(self, space: Space) -> Space | None:
        """The first space of tokens of the same places of the same input, if it is another."""
        if space.kind != "token" or space.parents is not None or space.coordinates is None:
            return None
        for other in self._spaces[: space.index]:
            if (
                other.kind == "token" and other.parents is None and other.coordinates is not None
                and self.origin(other.name) == self.origin(space.name)
                and (other.size, other.examples) == (space.size, space.examples)
                and torch.equal(other.coordinates, space.coordinates)
            ):  # fmt: skip
                return other
        return None

    def same(self, kept: Tensor, absorbed: Tensor) -> bool:
        """Note that two planes of one shape were summed: `absorbed` lives on as `kept`.

        Returns:
            `False`, with nothing noted, if that cannot be: a token would live on as several,
            tokens of one space or of different examples were added to each other, or it is the
            other that lives on as this one.
        """
        kept, absorbed = compact_together(kept, absorbed)
        to, owner, to_local = self.locate(kept.reshape(-1))
        of, example, of_local = self.locate(absorbed.reshape(-1))
        if bool(((owner >= 0) & (example >= 0) & (owner != example)).any()):
            return False
        shared = set(of.tolist()) & set(to.tolist()) - {-1}
        if any(bool(((of == i) & (to == i) & (of_local != to_local)).any()) for i in shared):
            return False
        tables: dict[tuple[int, int], Tensor] = {}
        homes: dict[int, Tensor] = {}
        for a in set(of.tolist()):
            for k in set(to[of == a].tolist()):
                if a < 0 or k < 0 or a == k:
                    continue
                pick = (of == a) & (to == k)
                places = example[pick].clamp(min=0), of_local[pick]
                if (k, a) in self._same:
                    return False
                known = self._same.get((a, k))
                size = max(self[a].examples, 1), self[a].size
                table = torch.full(size, -1) if known is None else known.clone()
                before = table[places]
                table[places] = to_local[pick]
                moved = (before >= 0) & (before != to_local[pick])
                home = homes.setdefault(a, torch.full(size, -1))
                elsewhere = (home[places] >= 0) & (home[places] != k)
                home[places] = k
                if bool((moved | elsewhere | (table[places] != to_local[pick])).any()):
                    return False
                tables[a, k] = table
        self._same.update(tables)
        return True

    def same_input(self, kept: Tensor, absorbed: Tensor) -> bool:
        """Note that two inputs were summed, element by element, before any token was born.

        Returns:
            `False`, with nothing noted, if elements of different places or examples met.
        """
        (to, one, place), (of, two, other) = self.locate(kept), self.locate(absorbed)
        if (
            not (torch.equal(place, other) and torch.equal(one, two))
            or len(_distinct(to)) > 1
            or len(_distinct(of)) > 1
        ):
            return False
        name, theirs = self[int(to.max())].name, self[int(of.max())].name
        if self.origin(name) != self.origin(theirs):
            self._origins[self.origin(theirs)] = self.origin(name)
        return True

    def same_rows(self, one: Tensor, other: Tensor) -> bool:
        """Whether two planes hold elements of the same rows of one input, the last axis apart."""
        centres = [self.coordinates(plane) for plane in (one, other)]
        if centres[0] is None or centres[1] is None or centres[0].shape[-1] < 2:
            return False
        examples = [self.locate(plane)[1] for plane in (one, other)]
        rows = torch.equal(centres[0][..., :-1], centres[1][..., :-1])
        return rows and torch.equal(*examples)

    def same_places(self, one: Tensor, other: Tensor) -> bool:
        """Whether two planes hold elements of the same places, be it of different inputs."""
        return all(map(torch.equal, self.locate(one)[1:], self.locate(other)[1:]))

    def token_axes(self, plane: Tensor) -> frozenset[int]:
        """The axes of a plane along which the tokens of one example differ."""
        return self.memory.of((plane,), "axes", lambda: self._axes(plane))[0]

    def example_axes(self, plane: Tensor) -> frozenset[int]:
        """The axes of a plane along which examples differ."""
        return self.memory.of((plane,), "axes", lambda: self._axes(plane))[1]

    def _axes(self, plane: Tensor) -> tuple[frozenset[int], frozenset[int]]:
        """The axes along which tokens differ within an example, and those along which examples do.

        No token counts as any token.
        """
        small = compact(plane)
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

    def origin(self, name: str) -> str:
        """The input whose tokens an input feeds: itself, or the one that it was added to."""
        while name in self._origins:
            name = self._origins[name]
        return name

    def absorbed_into(self, space: Space) -> list[tuple[Space, Tensor]]:
        """Spaces summed into this one, with `[examples, size]` local numbers in it, or -1."""
        examples = max(space.examples, 1)
        found = {space.index: torch.arange(space.size).expand(examples, -1)}
        frontier = [space.index]
        while frontier:
            k = frontier.pop()
            for (a, into), table in self._same.items():
                if into == k and a not in found:
                    known = found[k].expand(max(len(found[k]), len(table)), -1)
                    through = known.gather(1, table.clamp(min=0).expand(len(known), -1))
                    found[a] = torch.where(table >= 0, through, -1)
                    frontier.append(a)
        return [(self[i], table) for i, table in found.items() if i != space.index]


def _distinct(index: Tensor) -> list[int]:
    """The spaces among indices, in order; -1 is none."""
    found: list[int] = torch.unique(index).tolist()
    return [i for i in found if i >= 0]


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


def _hull(ranges: Tensor) -> Tensor:
    """`[n, d, 2]`, the ranges that hold all of `[n, m, d, 2]`."""
    return torch.stack([ranges[..., 0].amin(-2), ranges[..., 1].amax(-2)], -1)


def _together(extents: Sequence[Extent]) -> Extent:
    """What the same tokens were made of in several ways."""
    return Extent(_hull(torch.stack([e.ranges for e in extents], 1)), along_of_all(extents))


def _among(ids: Tensor, known: Tensor) -> Tensor:
    """`[n]` whether all ids `[n, m]` of a row are among those that are known; -1 always is."""
    return ((ids.unsqueeze(-1) == known.unsqueeze(1)).any(-1) | (ids < 0)).all(-1)
