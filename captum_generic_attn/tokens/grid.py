"""Grids: where tokens lie in an input, and how a value per token becomes a map of its shape.

`attribution` asks `fit_grid` for the grid that a space of tokens forms in its input (the patches
of a picture, the words of a sentence) and lays the values out by `Grid.to_tokens` and
`Grid.to_input`. The geometry comes from the model's own patch convolution (or from whatever made
the tokens), as centres of receptive fields; nothing is guessed from the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of tokens in an input.

    `axes` are the axes of the input (0 is the batch) along which tokens differ; `counts`,
    `offset` and `stride` say how many tokens lie along each, where the centre of the first one is
    and how far apart they are, in elements. `order` lists the tokens in grid order.
    """

    axes: tuple[int, ...]
    counts: tuple[int, ...]
    offset: tuple[float, ...]
    stride: tuple[float, ...]
    order: Tensor

    @property
    def of_elements(self) -> bool:
        """Whether each token is one element along each axis: words, regions."""
        return all(
            s == 1.0 and o.is_integer() for s, o in zip(self.stride, self.offset, strict=True)
        )

    def to_tokens(self, values: Tensor) -> Tensor:
        """Lay `[B, n]` token values out on the grid: `[B, *counts]`."""
        return values[:, self.order.to(values.device)].reshape(len(values), *self.counts)

    def to_elements(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Lay `[B, n]` values of tokens that are elements out on all of them; the others get 0."""
        full = self.to_input(values, shape, "nearest", spill=False)
        others = tuple(0 if i and i not in self.axes else slice(None) for i in range(len(shape)))
        return full[others]

    def to_input(
        self, values: Tensor, shape: torch.Size, interpolation: str, *, spill: bool = True
    ) -> Tensor:
        """Spread `[B, n]` token values over an input of `shape`, undivided.

        An element takes the value of the token whose cell it lies in (`"nearest"`) or a linear
        mixture of its neighbours (`"bilinear"`); beyond the last centre the outermost value goes
        on. The rest that strides leave at an edge, less than a cell, takes the nearest cell's value
        with `spill`; what is further out was not read and gets 0. Axes along which tokens do not
        differ (channels, features) repeat the value.
        """
        tokens = self.to_tokens(values)
        sizes = [shape[axis] for axis in self.axes]
        if any(s != 1.0 or o != 0.0 for s, o in zip(self.stride, self.offset, strict=True)) or (
            sizes != list(self.counts)
        ):
            exact = "nearest" if self.of_elements else interpolation
            tokens = self._resample(tokens, sizes, exact, spill=spill)
        broadcast = [n if i in (0, *self.axes) else 1 for i, n in enumerate(shape)]
        return tokens.reshape(broadcast).expand(shape).contiguous()

    def _resample(
        self, tokens: Tensor, sizes: list[int], interpolation: str, *, spill: bool
    ) -> Tensor:
        missing = max(0, 2 - len(self.axes))  # grid_sample knows two and three axes
        counts = (1,) * missing + self.counts
        positions = [torch.zeros(1, dtype=tokens.dtype, device=tokens.device)] * missing
        inside = torch.ones((), dtype=torch.bool, device=tokens.device)
        for size, offset, stride, count in zip(
            sizes, self.offset, self.stride, self.counts, strict=True
        ):
            at = torch.arange(size, dtype=tokens.dtype, device=tokens.device)
            cell = (at - offset) / stride
            reach = 0.5 + (1 - 1 / stride if spill else 0) + 1e-6
            inside = inside.unsqueeze(-1) & ((cell >= -reach) & (cell <= count - 1 + reach))
            cell = cell.clamp(0, count - 1)
            positions.append((2 * cell + 1) / count - 1)
        mesh = torch.meshgrid(*positions, indexing="ij")
        points = torch.stack(mesh[::-1], -1).unsqueeze(0).expand(len(tokens), *[-1] * len(mesh), -1)
        values = F.grid_sample(
            tokens.reshape(len(tokens), 1, *counts),
            points,
            mode="nearest" if interpolation == "nearest" else "bilinear",
            padding_mode="border",
            align_corners=False,
        ).reshape(len(tokens), *sizes)
        return values * inside


def fit_grid(coordinates: Tensor, shape: torch.Size) -> Grid | None:
    """The regular grid that tokens with these centres form in an input of `shape`.

    Args:
        coordinates: `[n, d]` centres in the `d` non-batch axes of the input.
        shape: the input's shape, batch included.

    Returns:
        The grid, or `None` if the centres form none.

    Example:
        >>> centres = torch.tensor([[0.0, 7.5, 7.5], [0.0, 7.5, 23.5]])
        >>> grid = fit_grid(centres, torch.Size([1, 3, 16, 32]))
        >>> grid.axes, grid.counts, grid.stride
        ((2, 3), (1, 2), (16.0, 16.0))
    """
    axes, counts, offset, stride, places = [], [], [], [], []
    if len(shape) == 1 and len(coordinates) == 1:  # one value of each example, one token
        return Grid((), (), (), (), torch.zeros(1, dtype=torch.long))
    for axis in range(coordinates.shape[1]):
        centres = coordinates[:, axis].contiguous()
        levels = torch.unique(centres)  # sorted
        picture = len(shape) == 4 and axis > 0  # a picture keeps both axes, be it one patch wide
        if len(levels) == 1 and not picture and coordinates.shape[1] > 1:
            continue
        steps = levels.diff()
        if len(steps) and not torch.allclose(steps, steps[0].expand_as(steps)):
            return None
        axes.append(axis + 1)
        counts.append(len(levels))
        offset.append(float(levels[0]))
        stride.append(float(steps[0]) if len(steps) else float(shape[axis + 1]))
        places.append(torch.bucketize(centres, levels))
    if not axes:  # one token: it covers everything, wherever its axis is
        axes, counts, offset, stride = [1], [1], [0.0], [float(shape[1])]
        places = [torch.zeros(len(coordinates), dtype=torch.long)]
    if math.prod(counts) != len(coordinates):
        return None
    cell = torch.zeros(len(coordinates), dtype=torch.long)
    for place, count in zip(places, counts, strict=True):
        cell = cell * count + place
    if len(torch.unique(cell)) != len(cell):
        return None
    return Grid(tuple(axes), tuple(counts), tuple(offset), tuple(stride), torch.argsort(cell))
