"""Where tokens lie in the input that they come from: centres, ranges of elements, lattices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_generic_attn.tokens.extent import (
    NOWHERE,
    Extent,
    hull,
    joined,
    moved_along,
    sums_along,
)
from captum_generic_attn.tokens.ids import unique_rows
from captum_generic_attn.tokens.registry import SpaceRegistry, distinct


class TokenPlaces(SpaceRegistry):
    """A registry of token spaces that knows where tokens lie in their inputs."""

    def coordinates(self, ids: Tensor) -> Tensor | None:
        """Centres `[*ids, d]` of tokens that all come from one input, else `None`."""
        index, _, local = self.locate(ids)
        first = int(index.reshape(-1)[0]) if ids.numel() else -1
        if first < 0 or bool((index != first).any()):
            return None
        return self[first].at(local)

    def extent(self, rows: Tensor) -> Extent | None:
        """The elements of one input that tokens with parents `[n, m]` were made of.

        `None` if they come from several inputs, or are unknown. Parameters do not count.
        """
        index, _, local = self.locate(rows)
        sources = [space for i in distinct(index) if (space := self[i]).kind != "parameter"]
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
            found.append(Extent(hull(ranges), along))
        return joined(found)

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

    def _places_of_lines(self, rows: Tensor) -> tuple[Tensor, Extent] | None:
        """As `_places_of_rows`, for rows that are straight lines of evenly spaced elements."""
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
            hull(torch.stack([start, last], 1).long().unsqueeze(-1).expand(-1, -1, -1, 2)),
            sums_along([start, steps], source.shape),
        )
        return (start + last) / 2, extent

    def of_picture(
        self, token_ids: Tensor, centres: Tensor, extent: Extent, shape: torch.Size
    ) -> Tensor:
        """Number the elements of a picture after it was resized; ids of `shape`.

        `token_ids` `[B, C, *spatial]` are the ids before; rows of the batch may be frames of one
        example. `centres` `[B, *spatial, d]` and `extent` are those of the new first channel.
        """
        source = self[self.indices(token_ids)[0]]
        channels = self.coordinates(token_ids[0].flatten(1)[:, 0])
        assert channels is not None  # noqa: S101 - a picture's elements lie somewhere
        apart = (channels - channels[0]).unsqueeze(1)  # [C, 1, d]: channels differ in their axis
        _, example, local = self.locate(token_ids.flatten(1).amax(1))
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

    def same_rows(self, one: Tensor, other: Tensor) -> bool:
        """Whether ids are of elements of the same rows of one input, the last axis apart."""
        centres = [self.coordinates(token_ids) for token_ids in (one, other)]
        if centres[0] is None or centres[1] is None or centres[0].shape[-1] < 2:
            return False
        examples = [self.locate(token_ids)[1] for token_ids in (one, other)]
        rows = torch.equal(centres[0][..., :-1], centres[1][..., :-1])
        return rows and torch.equal(*examples)

    def same_places(self, one: Tensor, other: Tensor) -> bool:
        """Whether ids are of elements of the same places, also of different inputs."""
        return all(map(torch.equal, self.locate(one)[1:], self.locate(other)[1:]))
