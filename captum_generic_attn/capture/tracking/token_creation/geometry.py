"""The geometry of new tokens of a map: centres and ranges of the elements in their windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.token_creation.windows import (
    Windows,
    elements_in,
    window_centres,
)
from captum_generic_attn.tokens.extent import Extent, along_of_all, moved_along, sums_along
from captum_generic_attn.tokens.spaces import TokenSpaces


def centres_of(
    spaces: TokenSpaces, lines: Tensor, starts: Sequence[float], steps: Sequence[float],
    out: torch.Size,
) -> Tensor | None:  # fmt: skip
    """`[B, *out, d]` centres of windows over maps `[B, *spatial]`; `None` if examples differ."""
    found: Tensor | None = None
    for rows in _rows_alike(spaces, lines):
        centres = _centres_of_alike(spaces, lines[rows], starts, steps, out)
        if centres is None:
            return None
        if found is None:
            found = centres.new_zeros(len(lines), *centres.shape)
        found[rows] = centres
    return found


def _centres_of_alike(
    spaces: TokenSpaces, lines: Tensor, starts: Sequence[float], steps: Sequence[float],
    out: torch.Size,
) -> Tensor | None:  # fmt: skip
    """`[*out, d]` centres of windows over maps `[B, *spatial]` of the same places."""
    if (lattice := spaces.lattice(lines)) is not None:
        placed, slopes = lattice
        for start, step, n, slope in zip(starts, steps, out, slopes, strict=True):
            places = start + step * torch.arange(n, dtype=torch.float64)
            placed = placed.unsqueeze(-2) + places.unsqueeze(-1) * slope
        return placed
    local = spaces.locate(lines)[2]
    if bool((local != local[0]).any()):
        return None
    known = lines[0] >= 0
    centres = spaces.coordinates(torch.where(known, lines[0], lines[0].amax()))
    return None if centres is None else window_centres(centres, known, starts, steps, out)


def extent_of(spaces: TokenSpaces, ids: Tensor, windows: Windows, out: torch.Size) -> Extent | None:
    """The elements in windows `[B, *out]` over channels `[B, c, *spatial]`, which are alike.

    `None` if that cannot be told.
    """
    groups = _rows_alike(spaces, ids[:, 0])
    parts = [_extent_of_alike(spaces, ids[rows], windows, out) for rows in groups]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    for one, other in combinations(found, 2):
        for axis, (mine, theirs) in enumerate(zip(one.along, other.along, strict=True)):
            first, last = other.ranges[..., axis, 0].min(), other.ranges[..., axis, 1].max()
            if not bool((mine & theirs).any()) and bool(mine[first : last + 1].any()):
                return None  # channels that stand among those of other tokens
    ranges = found[0].ranges.new_zeros(len(ids), *found[0].ranges.shape)
    for rows, part in zip(groups, found, strict=True):
        ranges[rows] = part.ranges
    return Extent(ranges, along_of_all(found))


def _extent_of_alike(
    spaces: TokenSpaces, ids: Tensor, windows: Windows, out: torch.Size
) -> Extent | None:
    """The elements in windows `[*out]` over channels `[B, c, *spatial]` of the same places."""
    lines = ids[:, 0]
    apart = channel_offsets(spaces, ids)
    if apart is None:
        return None
    shape = spaces[spaces.indices(lines)[0]].shape
    lattice = spaces.lattice(lines)
    if lattice is not None and shape is not None:
        ranges, read = _ranges_on_lattice(lattice, windows, lines.shape[1:])
        along = sums_along([lattice[0].unsqueeze(0), apart, *read], shape)
    else:
        found = spaces.extent(elements_in(lines[:1].unsqueeze(1), windows, out).flatten(0, -2))
        if found is None:
            return None
        ranges = found.ranges.view(*out, -1, 2)
        along = found.along if shape is None else moved_along(found.along, apart)
    return Extent(ranges.long() + torch.stack([apart.amin(0), apart.amax(0)], -1), along)


def _ranges_on_lattice(
    lattice: tuple[Tensor, Tensor], windows: Windows, spatial: torch.Size
) -> tuple[Tensor, list[Tensor]]:
    """The ranges `[*out, d, 2]` of windows over a lattice, and what they read along each axis.

    Args:
        lattice: the place `[d]` of the first element, and the steps `[spatial axes, d]`.
        windows: what is read along each axis.
        spatial: the number of elements along each axis.
    """
    origin, slopes = lattice
    ranges = origin.new_zeros(*[1] * len(spatial), len(origin), 2) + origin.unsqueeze(-1)
    read = []
    for axis, (line, n, slope) in enumerate(zip(windows.along, spatial, slopes, strict=True)):
        inside = [[i for i in r if 0 <= i < n] or [min(max(r[0], 0), n - 1)] for r in line]
        ends = torch.tensor([[i[0], i[-1]] for i in inside], dtype=origin.dtype)
        reach = (ends.unsqueeze(1) * slope.unsqueeze(-1)).sort(-1).values
        here = [len(line) if a == axis else 1 for a in range(len(spatial))]
        ranges = ranges + reach.view(*here, len(origin), 2)
        places = torch.tensor(sorted({i for window in inside for i in window}))
        read.append(places.unsqueeze(-1) * slope)
    return ranges, read


def channel_offsets(spaces: TokenSpaces, ids: Tensor) -> Tensor | None:
    """The distance `[c, d]` of each of the channels of `[B, c, *spatial]` from the first."""
    known = (ids[0, 0].flatten() >= 0).nonzero().flatten()
    channels = spaces.coordinates(ids[0].flatten(1)[:, int(known[0])])
    return None if channels is None else (channels - channels[0]).long()


def _rows_alike(spaces: TokenSpaces, lines: Tensor) -> list[Tensor]:
    """Groups of maps `[B, *spatial]` that lie at the same places of their examples.

    One group of all maps, or one for each frame where the batch holds the frames of examples.
    """
    places = spaces.locate(lines.flatten(1).amax(1))[2]
    return [(places == place).nonzero().flatten() for place in torch.unique(places)]
