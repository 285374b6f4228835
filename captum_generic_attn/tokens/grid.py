"""Grids: where tokens lie in an input, and how a value per token becomes a map of its shape.

`input_maps` asks `fit_grid` for the grid that tokens form in their input (the patches of a picture,
the words of a sentence) and lays the values out by `Grid.to_tokens` and `Grid.to_input`. The
geometry comes from the model's own patch convolution (or from whatever made the tokens), as centres
of receptive fields and the ranges of elements that were read; nothing is guessed from the number of
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from captum_generic_attn.tokens.extent import Extent


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of tokens in an input.

    `axes` are the axes of the input (0 is the batch) along which tokens differ; `counts`,
    `offset` and `stride` say how many tokens lie along each, where the centre of the first one is
    and how far apart they are, in elements. Where a token is one element along an axis (a word, a
    region, a frame), it is `single` there, and stands at its place among all elements: `counts` are
    those of the input. `cells` is the place of each token in the grid, all axes in one.
    """

    axes: tuple[int, ...]
    counts: tuple[int, ...]
    offset: tuple[float, ...]
    stride: tuple[float, ...]
    single: tuple[bool, ...]
    cells: Tensor

    def to_tokens(self, values: Tensor) -> Tensor:
        """Lay `[B, n]` token values out on the grid: `[B, *counts]`, zero where there is none."""
        laid = values.new_zeros(len(values), math.prod(self.counts))
        cells = self.cells.to(values.device)
        return laid.index_add_(1, cells, values).view(-1, *self.counts)

    def to_input(self, values: Tensor, shape: torch.Size, interpolation: str) -> Tensor:
        """Spread `[B, n]` token values over an input of `shape`, undivided.

        An element takes the value of the token whose cell it lies in (`"nearest"`) or a linear
        mixture of its neighbours (`"bilinear"`); beyond the last centre the outermost value goes
        on. Channels of a picture, and axes along which tokens are single elements, are never mixed.
        Axes along which tokens do not differ (channels, features) repeat the value.
        """
        tokens = self.to_tokens(values)
        for place, axis in enumerate(self.axes):
            if not self.single[place]:
                mixed = interpolation != "nearest" and not (len(shape) == 4 and axis == 1)
                tokens = self._resample(tokens, place, shape[axis], mixed=mixed)
        broadcast = [n if i in (0, *self.axes) else 1 for i, n in enumerate(shape)]
        return tokens.reshape(broadcast).expand(shape)

    def _resample(self, tokens: Tensor, place: int, size: int, *, mixed: bool) -> Tensor:
        """Values along one of the grid's axes at each of `size` elements of the input."""
        lines = tokens.movedim(place + 1, -1)
        at = torch.arange(size, dtype=torch.float64, device=tokens.device)
        cell = (at - self.offset[place]) / self.stride[place]
        cell = cell.clamp(0, self.counts[place] - 1)
        if mixed:
            below = cell.floor().clamp(max=max(self.counts[place] - 2, 0)).long()
            above = (below + 1).clamp(max=self.counts[place] - 1)
            lines = torch.lerp(lines[..., below], lines[..., above], (cell - below).to(lines))
        else:
            lines = lines[..., (cell + 0.5).floor().long().clamp(max=self.counts[place] - 1)]
        return lines.movedim(-1, place + 1)


def fit_grid(
    coordinates: Tensor, ranges: Tensor, shape: torch.Size, *, several: bool = False
) -> Grid | None:
    """The regular grid that tokens form in an input of `shape`.

    Args:
        coordinates: `[n, d]` centres in the `d` non-batch axes of the input.
        ranges: `[n, d, 2]` first and last element along each axis that a token was made of.
        shape: the input's shape, batch included.
        several: whether as many tokens may share every cell, whose values are added then.

    Returns:
        The grid, or `None` if the tokens form none.

    Example:
        >>> centres = torch.tensor([[1.0, 7.5, 7.5], [1.0, 7.5, 23.5]])
        >>> ranges = torch.tensor([[[0, 2], [0, 15], [0, 15]], [[0, 2], [0, 15], [16, 31]]])
        >>> grid = fit_grid(centres, ranges, torch.Size([1, 3, 16, 32]))
        >>> grid.axes, grid.counts, grid.stride
        ((2, 3), (1, 2), (16.0, 16.0))
    """
    sizes = shape[1:]
    axes, counts, offset, stride, single, places = [], [], [], [], [], []
    for axis, size in enumerate(sizes):
        centres = coordinates[:, axis].contiguous()
        levels = torch.unique(centres)  # sorted
        first, last = ranges[:, axis].unbind(-1)
        alone = bool((first == last).all())
        picture = len(sizes) == 3 and axis > 0  # a picture keeps both axes, be it one patch wide
        frame = alone and size > 1 and len(sizes) > 3  # of a video, be it the only one
        if len(levels) == 1 and not picture and not frame and len(sizes) > 1:
            continue
        steps = levels.diff()
        regular = not len(steps) or torch.allclose(steps, steps[0].expand_as(steps))
        if not alone and not regular:
            return None
        axes.append(axis + 1)
        single.append(alone)
        counts.append(size if alone else len(levels))
        offset.append(0.0 if alone else float(levels[0]))
        stride.append(1.0 if alone else float(steps[0]) if len(steps) else float(size))
        places.append(first if alone else torch.bucketize(centres, levels))
    if not axes and sizes:  # one token, which covers all that it was made of
        axes, counts, offset, stride, single = [1], [1], [0.0], [float(sizes[0])], [False]
        places = [torch.zeros(len(coordinates), dtype=torch.long)]
    cells = torch.zeros(len(coordinates), dtype=torch.long)
    for place, count in zip(places, counts, strict=True):
        cells = cells * count + place
    held = torch.bincount(cells, minlength=math.prod(counts)).view(counts)
    whole = [i for i, alone in enumerate(single) if not alone]
    if int(held.max()) > 1 and not several:
        return None
    if whole and bool((held != held.amax(whole, keepdim=True)).any()):
        return None
    return Grid(tuple(axes), tuple(counts), tuple(offset), tuple(stride), tuple(single), cells)


def elements_of(extent: Extent, shape: torch.Size) -> Tensor:
    """Which elements of an input some of its tokens were made of.

    Args:
        extent: of the tokens, with ranges `[n, d, 2]`.
        shape: the input's shape, batch included.

    Returns:
        True for these, `shape` without its batch.

    Example:
        >>> ranges = torch.tensor([[[0, 1]], [[3, 4]]])
        >>> along = torch.tensor([True, True, True, True, False])
        >>> elements_of(Extent(ranges, (along,)), torch.Size([2, 5])).int()
        tensor([1, 1, 0, 1, 0], dtype=torch.int32)
    """
    sizes = shape[1:]
    ranges = extent.ranges[(extent.ranges[..., 0] <= extent.ranges[..., 1]).all(-1)]
    found = torch.zeros(sizes, dtype=torch.bool)
    if not len(ranges):
        return found
    differ = (ranges != ranges[0]).any(-1).any(0).tolist()
    varying = [axis for axis, differs in enumerate(differ) if differs]
    # One where a token begins along an axis, minus one behind its end: summed up, one inside.
    shown = [sizes[axis] + 1 for axis in varying]
    steps = torch.zeros(shown, dtype=torch.int32) if varying else torch.ones((), dtype=torch.int32)
    for ends in product((0, 1), repeat=len(varying)) if varying else ():
        corner = tuple(ranges[:, axis, end] + end for axis, end in zip(varying, ends, strict=True))
        sign = torch.tensor((-1) ** sum(ends), dtype=torch.int32)
        steps.index_put_(corner, sign, accumulate=True)
    for place in range(len(varying)):
        steps = steps.cumsum(place, dtype=torch.int32).narrow(place, 0, steps.shape[place] - 1)
    inside = (steps > 0).view([n if axis in varying else 1 for axis, n in enumerate(sizes)])
    alike = tuple(
        slice(None) if axis in varying else slice(int(first), int(last) + 1)
        for axis, (first, last) in enumerate(ranges[0].tolist())
    )
    found[alike] = inside
    for axis, read in enumerate(extent.along):
        if not bool(read.all()):
            found &= read.view([-1 if a == axis else 1 for a in range(len(sizes))])
    return found
