"""Arithmetic on planes of token ids, and the births of tokens.

Pure functions of integer tensors, called by `transfer` and `attention`. Planes are mostly expanded
views (stride 0 along heads and features), which keeps them small and makes "does it vary along
this axis" cheap to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from captum_generic_attn.tokens.ids import compact, compact_together


def varies(plane: Tensor, axis: int) -> bool:
    """Whether tokens differ along an axis; padding counts as any token."""
    if plane.stride(axis) == 0 or plane.shape[axis] <= 1:
        return False
    plane = compact(plane)
    most = plane.amax(axis, keepdim=True)
    return bool(((plane != most) & (plane >= 0)).any())


def first_along(plane: Tensor, axis: int) -> Tensor:
    """The plane with one element along an axis: the token there, were some of them padding."""
    if plane.shape[axis] <= 1 or plane.stride(axis) == 0:
        return plane.narrow(axis, 0, min(1, plane.shape[axis]))
    return plane.amax(axis, keepdim=True)


def same_plane(a: Tensor, b: Tensor) -> bool:
    """Whether two planes of one shape hold the same tokens."""
    if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    return torch.equal(*compact_together(a, b))


def relabel(
    plane: Tensor, labels: Sequence[str], out_labels: Sequence[str], shape: torch.Size
) -> Tensor | None:
    """Carry a factor's plane to a product's result; `None` if an axis summed away mixes tokens."""
    kept = []
    for axis, label in enumerate(labels):
        if label in out_labels:
            kept.append(label)
            continue
        if varies(plane, axis):
            return None
        plane = first_along(plane, axis)
    plane = plane.reshape(
        [n for n, label in zip(plane.shape, labels, strict=True) if label in kept]
    )
    ranked = sorted(range(len(kept)), key=lambda i: out_labels.index(kept[i]))
    plane = plane.permute(ranked)
    for position, label in enumerate(out_labels):
        if label not in kept:
            plane = plane.unsqueeze(position)
    return plane.expand(shape)


def distinct_along(plane: Tensor, axis: int) -> Tensor:
    """The plane without those entries along an axis that repeat the one before."""
    if plane.shape[axis] <= 1 or plane.stride(axis) == 0:
        return plane.narrow(axis, 0, min(1, plane.shape[axis]))
    lines = plane.movedim(axis, 0)
    small = lines[(slice(None), *(slice(1 if s == 0 else None) for s in lines.stride()[1:]))]
    changes = (small[1:] != small[:-1]).reshape(len(small) - 1, -1).any(-1)
    kept = torch.cat([torch.ones(1, dtype=torch.bool), changes])
    return lines[kept].movedim(0, axis)


@dataclass(frozen=True)
class Windows:
    """What each place of a result reads of the operand: `along[axis][place]` is a range."""

    along: Sequence[Sequence[range]]

    @property
    def regular(self) -> bool:
        """Whether all windows along an axis are of one size and evenly spaced."""
        sizes = [{len(r) for r in line} for line in self.along]
        gaps = [{b.start - a.start for a, b in pairwise(line)} for line in self.along]
        return all(len(s) == 1 for s in sizes) and all(len(g) < 2 for g in gaps)

    @property
    def starts(self) -> list[float]:
        """Centre of the first window along each axis."""
        return [(line[0].start + line[0][-1]) / 2 for line in self.along]

    @property
    def steps(self) -> list[float]:
        """Distance of windows along each axis."""
        return [line[1].start - line[0].start if len(line) > 1 else 0 for line in self.along]


def windows_of(lines: Tensor, windows: Windows, out: torch.Size) -> Tensor:
    """What each window holds: `[B, c, *spatial]` ids to `[B, *out, m]`, -1 beyond the edges."""
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
    """Centres of the windows of a convolution or a pooling.

    Args:
        centres: `[*spatial, d]` centres of the elements that the windows read.
        known: `[*spatial]` False where an element is padding.
        starts: position, in elements of the operand, of the centre of the first window.
        steps: distance of windows.
        out: spatial shape of the result.

    Returns:
        `[*out, d]`, going on regularly over padding; `None` if the operand is no regular grid.
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
