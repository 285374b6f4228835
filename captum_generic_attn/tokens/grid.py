"""Token grids: where tokens lie in an input, and how values of tokens become a map of the input.

`fit_grid` finds the grid that the tokens of an input form (the patches of an image, the words of a
sentence). `Grid.to_tokens` and `Grid.to_input` lay values out on it. The geometry is that of the
operation that created the tokens, such as the patch convolution: the centres of their receptive
fields, and the ranges of elements that they read. The number of tokens alone never decides it.
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

    Attributes:
        axes: the axes of the input along which tokens differ; 0 is the batch.
        counts: the number of tokens along each of these axes.
        offset: the centre of the first token along each axis, in elements of the input.
        stride: the distance of tokens along each axis, in elements.
        single: whether each token is one element along the axis (a word, a region, a frame). The
            grid then has a place for every element of the input there, also where no token is.
        cells: `[n]` the flat index of each token in the grid.
    """

    axes: tuple[int, ...]
    counts: tuple[int, ...]
    offset: tuple[float, ...]
    stride: tuple[float, ...]
    single: tuple[bool, ...]
    cells: Tensor

    def to_tokens(self, values: Tensor) -> Tensor:
        """Lay `[B, n]` token values out on the grid: `[B, *counts]`, zero where no token is."""
        laid = values.new_zeros(len(values), math.prod(self.counts))
        cells = self.cells.to(values.device)
        return laid.index_add_(1, cells, values).view(-1, *self.counts)

    def to_input(self, values: Tensor, shape: torch.Size, interpolation: str) -> Tensor:
        """Spread `[B, n]` token values over an input of `shape`; the values are not divided.

        Each element takes the value of the token in whose cell it lies (`"nearest"`), or a linear
        interpolation between neighbouring tokens (`"bilinear"`). Beyond the outermost centres, the
        outermost values are repeated. Values are never interpolated between the channels of an
        image, nor along axes where tokens are single elements. They are repeated along axes where
        tokens do not differ (channels, features).

        Args:
            values: `[B, n]`, one value per token.
            shape: the input's shape, batch included.
            interpolation: `"nearest"` or `"bilinear"`.

        Returns:
            A tensor of `shape`.
        """
        tokens = self.to_tokens(values)
        for place, axis in enumerate(self.axes):
            if not self.single[place]:
                mixed = interpolation != "nearest" and not (len(shape) == 4 and axis == 1)
                tokens = self._resample(tokens, place, shape[axis], mixed=mixed)
        broadcast = [n if i in (0, *self.axes) else 1 for i, n in enumerate(shape)]
        return tokens.reshape(broadcast).expand(shape)

    def _resample(self, tokens: Tensor, place: int, size: int, *, mixed: bool) -> Tensor:
        """The values at each of `size` elements of the input, along the grid's axis `place`."""
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
        several: whether cells may hold several tokens, the same number in each. Their values are
            then added.

    Returns:
        The grid, or `None` if the tokens do not form one.

    Example:
        >>> centres = torch.tensor([[1.0, 7.5, 7.5], [1.0, 7.5, 23.5]])
        >>> ranges = torch.tensor([[[0, 2], [0, 15], [0, 15]], [[0, 2], [0, 15], [16, 31]]])
        >>> grid = fit_grid(centres, ranges, torch.Size([1, 3, 16, 32]))
        >>> grid.axes, grid.counts, grid.stride
        ((2, 3), (1, 2), (16.0, 16.0))
    """
    axes = _axes_of(coordinates, ranges, shape[1:])
    if axes is None:
        return None
    cells = torch.zeros(len(coordinates), dtype=torch.long)
    for axis in axes:
        cells = cells * axis.count + axis.places
    if not _is_filled(cells, axes, several=several):
        return None
    return Grid(
        axes=tuple(axis.axis for axis in axes),
        counts=tuple(axis.count for axis in axes),
        offset=tuple(axis.offset for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        single=tuple(axis.single for axis in axes),
        cells=cells,
    )


@dataclass(frozen=True, eq=False)
class _Axis:
    """The tokens along one axis of an input, of `size` elements.

    `single` says whether each token is one element there, `levels` are the distinct centres of
    tokens, sorted, and `places` `[n]` the place of each token in the grid.
    """

    axis: int
    size: int
    single: bool
    levels: Tensor
    places: Tensor

    @classmethod
    def of(cls, axis: int, size: int, centres: Tensor, first: Tensor, last: Tensor) -> _Axis:
        """The tokens with these centres `[n]` and these first and last elements `[n]`."""
        single = bool((first == last).all())
        levels = torch.unique(centres)  # sorted
        return cls(
            axis, size, single, levels, first if single else torch.bucketize(centres, levels)
        )

    @property
    def differs(self) -> bool:
        """Whether tokens differ along the axis."""
        return len(self.levels) != 1

    def is_kept(self, sizes: torch.Size) -> bool:
        """Whether the axis is one of the grid even if all tokens are at one place along it.

        So are both axes of an image, the frames of a video, and the only axis of an input.
        """
        of_image = len(sizes) == 3 and self.axis > 1
        of_frames = len(sizes) > 3 and self.single and self.size > 1
        return of_image or of_frames or len(sizes) <= 1

    @property
    def is_regular(self) -> bool:
        """Whether the tokens are evenly spaced, or elements, which always have a place."""
        steps = self.levels.diff()
        return self.single or not len(steps) or torch.allclose(steps, steps[0].expand_as(steps))

    @property
    def count(self) -> int:
        """The number of places along the axis."""
        return self.size if self.single else len(self.levels)

    @property
    def offset(self) -> float:
        """The centre of the first token."""
        return 0.0 if self.single else float(self.levels[0])

    @property
    def stride(self) -> float:
        """The distance of tokens."""
        if self.single:
            return 1.0
        return float(self.levels[1] - self.levels[0]) if self.differs else float(self.size)


def _axes_of(coordinates: Tensor, ranges: Tensor, sizes: torch.Size) -> list[_Axis] | None:
    """The axes of a grid in an input of these sizes; `None` if tokens are not evenly spaced."""
    found = []
    for number, size in enumerate(sizes):
        centres, (first, last) = coordinates[:, number].contiguous(), ranges[:, number].unbind(-1)
        axis = _Axis.of(number + 1, size, centres, first, last)
        if not axis.differs and not axis.is_kept(sizes):
            continue
        if not axis.is_regular:
            return None
        found.append(axis)
    if not found and sizes:  # one token, which covers all that it was made of
        places = torch.zeros(len(coordinates), dtype=torch.long)
        found = [_Axis(1, sizes[0], single=False, levels=torch.zeros(1), places=places)]
    return found


def _is_filled(cells: Tensor, axes: list[_Axis], *, several: bool) -> bool:
    """Whether the tokens in `cells` fill a grid of these axes.

    Along the axes where tokens are single elements, some places may be empty. Along the others, all
    places have equally many tokens: one, or `several`.
    """
    counts = [axis.count for axis in axes]
    held = torch.bincount(cells, minlength=math.prod(counts)).view(counts)
    if int(held.max()) > 1 and not several:
        return False
    whole = [i for i, axis in enumerate(axes) if not axis.single]
    return not whole or bool((held == held.amax(whole, keepdim=True)).all())


def elements_of(extent: Extent, shape: torch.Size) -> Tensor:
    """The elements of an input that some of its tokens were made of.

    Args:
        extent: of the tokens, with ranges `[n, d, 2]`.
        shape: the input's shape, batch included.

    Returns:
        True for these elements, in `shape` without its batch.

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
    inside = tuple(slice(first, last + 1) for first, last in ranges[0].tolist())
    found[tuple(slice(None) if d else s for d, s in zip(differ, inside, strict=True))] = (
        _inside_of_some(ranges, sizes, [axis for axis, differs in enumerate(differ) if differs])
    )
    for axis, read in enumerate(extent.along):
        if not bool(read.all()):
            found &= read.view([-1 if a == axis else 1 for a in range(len(sizes))])
    return found


def _inside_of_some(ranges: Tensor, sizes: torch.Size, axes: list[int]) -> Tensor:
    """Which places along some axes lie inside the ranges of some token; other axes have size 1.

    A token adds one where it begins along an axis, and minus one behind its end. Running sums of
    these count the tokens at each place.
    """
    if not axes:
        return torch.ones([1] * len(sizes), dtype=torch.bool)
    counts = torch.zeros([sizes[axis] + 1 for axis in axes], dtype=torch.int32)
    for ends in product((0, 1), repeat=len(axes)):
        corner = tuple(ranges[:, axis, end] + end for axis, end in zip(axes, ends, strict=True))
        sign = torch.tensor((-1) ** sum(ends), dtype=torch.int32)
        counts.index_put_(corner, sign, accumulate=True)
    for place, axis in enumerate(axes):
        counts = counts.cumsum(place, dtype=torch.int32).narrow(place, 0, sizes[axis])
    return (counts > 0).view([n if axis in axes else 1 for axis, n in enumerate(sizes)])
