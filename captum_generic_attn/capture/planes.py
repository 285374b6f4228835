"""Arithmetic on planes of token ids, and the births of tokens.

Pure functions of integer tensors, called by `transfer` and `attention`. Planes are mostly expanded
views (stride 0 along heads and features), which keeps them small and makes "does it vary along
this axis" cheap to answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(plane: Tensor) -> Tensor:
    """The plane with every repeated (stride 0) axis narrowed to one element."""
    for axis in range(plane.ndim):
        if plane.stride(axis) == 0 and plane.shape[axis] > 1:
            plane = plane.narrow(axis, 0, 1)
    return plane


def varies(plane: Tensor, axis: int) -> bool:
    """Whether tokens differ along an axis; padding counts as any token."""
    plane = compact(plane)
    if plane.shape[axis] <= 1:
        return False
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
    for axis in range(a.ndim):
        if a.stride(axis) == b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return torch.equal(a, b)


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


def window_centres(
    centres: Tensor, known: Tensor, starts: Sequence[float], steps: Sequence[int], out: torch.Size
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
