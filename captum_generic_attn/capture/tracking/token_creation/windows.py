"""The windows that convolutions, poolings and resizings read: their elements and their centres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import Operation


@dataclass(frozen=True)
class Windows:
    """The elements that each place of a result reads: `along[axis][place]` is their range."""

    along: Sequence[Sequence[range]]

    @property
    def regular(self) -> bool:
        """Whether all windows along an axis are of one size and evenly spaced."""
        sizes = [{len(r) for r in line} for line in self.along]
        gaps = [{b.start - a.start for a, b in pairwise(line)} for line in self.along]
        return all(len(s) == 1 for s in sizes) and all(len(g) < 2 for g in gaps)

    @property
    def starts(self) -> list[float]:
        """The centre of the first window along each axis."""
        return [(line[0].start + line[0][-1]) / 2 for line in self.along]

    @property
    def steps(self) -> list[float]:
        """The distance of windows along each axis."""
        return [line[1].start - line[0].start if len(line) > 1 else 0 for line in self.along]


def windows_read_by(op: Operation) -> Windows:
    """The windows that a convolution or pooling reads, along each spatial axis."""
    spatial, out = op.inputs[0].shape[2:], op.results[0].shape[2:]
    if op.name.startswith("adaptive"):
        return Windows([_adaptive(n, m) for n, m in zip(spatial, out, strict=True)])
    if op.name.startswith("conv"):
        kernel = list(op.inputs[1].shape[2:])
        stride, padding = op.argument(3, "stride", 1), op.argument(4, "padding", 0)
        dilation = op.argument(5, "dilation", 1)
    else:
        kernel = each_axis(op.argument(1, "kernel_size"), len(out))
        stride, padding = op.argument(2, "stride") or kernel, op.argument(3, "padding", 0)
        dilation = op.argument(4, "dilation", 1) if "max" in op.name else 1
    dilations = each_axis(dilation, len(out))
    spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    margins = _margins(padding, spans)
    return Windows(
        [
            [range(i * s - m, i * s - m + span + 1, d) for i in range(n)]
            for n, s, m, span, d in zip(
                out, each_axis(stride, len(out)), margins, spans, dilations, strict=True
            )
        ]
    )


def _adaptive(size: int, count: int) -> list[range]:
    """The windows of an adaptive pooling of `size` elements to `count` places."""
    return [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _margins(padding: Any, spans: list[int]) -> list[int]:
    """How far the first window along each axis begins before the first element."""
    if isinstance(padding, str):
        return [span // 2 if padding == "same" else 0 for span in spans]
    return each_axis(padding, len(spans))


def elements_in(lines: Tensor, windows: Windows, out: torch.Size) -> Tensor:
    """The ids in each window: `[B, c, *spatial]` to `[B, *out, m]`, -1 beyond the edges."""
    spatial = lines.shape[2:]
    index = torch.zeros([1] * (2 * len(spatial)), dtype=torch.long)
    valid = torch.ones_like(index, dtype=torch.bool)
    for axis, (line, size) in enumerate(zip(windows.along, spatial, strict=True)):
        width = max(map(len, line))
        places = torch.tensor([[*r, *[-1] * (width - len(r))] for r in line])
        shape = [1] * index.ndim
        shape[axis], shape[len(spatial) + axis] = places.shape
        places = places.view(shape)
        valid = valid & (places >= 0) & (places < size)
        index = index * size + places.clamp(0, size - 1)
    flat = lines.flatten(2)[:, :, index.reshape(-1)]
    flat = torch.where(valid.reshape(-1), flat, -1)
    rows = flat.view(*lines.shape[:2], *out, -1)
    return rows.movedim(1, -1).flatten(-2)


def window_centres(
    centres: Tensor, known: Tensor, starts: Sequence[float], steps: Sequence[float], out: torch.Size
) -> Tensor | None:
    """The centres of the windows of a convolution or a pooling.

    Args:
        centres: `[*spatial, d]` centres of the elements that the windows read.
        known: `[*spatial]`, False where an element is padding.
        starts: the centre of the first window along each axis, in elements of the operand.
        steps: the distance of windows along each axis.
        out: the spatial shape of the result.

    Returns:
        `[*out, d]`, continued regularly over padding; `None` if the operand is not a regular grid.
    """
    if not bool(known.any()):
        return None
    reference = known.nonzero()[0]
    grid = torch.meshgrid(*[torch.arange(n) for n in known.shape], indexing="ij")
    origin = centres[tuple(reference)]
    expected = origin.expand_as(centres).clone()
    moved = origin.expand(*out, -1).clone()
    for axis, (start, step) in enumerate(zip(starts, steps, strict=True)):
        line_at = tuple(slice(None) if a == axis else int(reference[a]) for a in range(known.ndim))
        line, valid = centres[line_at], known[line_at].nonzero().flatten()
        first, last = int(valid[0]), int(valid[-1])
        slope = (line[last] - line[first]) / max(last - first, 1)
        expected += (grid[axis] - int(reference[axis])).unsqueeze(-1) * slope
        places = start + step * torch.arange(out[axis], dtype=torch.float64)
        shape = [-1 if a == axis else 1 for a in range(known.ndim)]
        moved += ((places - int(reference[axis])).view(shape)).unsqueeze(-1) * slope
    return moved if torch.allclose(expected[known], centres[known]) else None


def each_axis(value: Any, axes: int) -> list[int]:
    """One number for each of the axes, given one for all or one for each."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in numbers * (axes if len(numbers) == 1 else 1)]
