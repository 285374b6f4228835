"""Convolutions and poolings of tokens: where they change the grid, each place is a new token."""

from __future__ import annotations

from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.token_creation import images
from captum_generic_attn.capture.tracking.token_creation.geometry import centres_of
from captum_generic_attn.capture.tracking.token_creation.rows import on_map
from captum_generic_attn.capture.tracking.token_creation.windows import (
    Windows,
    each_axis,
    elements_in,
    windows_read_by,
)
from captum_generic_attn.tokens.ids import distinct_along, first_along, varies
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_windows(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """The value of a convolution or pooling: its windows are new tokens, unless the grid is kept.

    Where the grid is kept, each position keeps its token. This is one of the approximations that
    the documentation lists.
    """
    lost = abstract.without_tokens(op.name)
    spatial_axes = int(op.name[-2])
    if not abstract.token_ids or op.inputs[0].ndim != spatial_axes + 2:
        return lost
    if abstract.role is Role.RAW:
        return lost if "transpose" in op.name else images.of_picture(spaces, abstract, op)
    if not abstract.role.of_tokens:
        return lost
    if _keeps_tokens(abstract, op):
        if _mixes_places(op) or "conv" not in op.name:
            spaces.approximate("neighbourhood", op.name)
        return abstract.map(lambda ids: first_along(ids, 1).expand(op.results[0].shape))
    if abstract.pairs or _mixes_features_alone(abstract.token_ids[0]):
        return lost  # heads may be mixed, keys may not
    if "transpose" in op.name:
        return _upsampled(spaces, abstract, op)
    return _of_map(spaces, abstract, op)


def _mixes_places(op: Operation) -> bool:
    """Whether a convolution has a kernel of more than one place."""
    return "conv" in op.name and any(n > 1 for n in op.inputs[1].shape[2:])


def _keeps_tokens(abstract: AbstractValue, op: Operation) -> bool:
    """Whether each place of the result keeps its token: the grid is the same, as are channels."""
    if op.inputs[0].shape[2:] != op.results[0].shape[2:]:
        return False
    if any(varies(ids, 1) for ids in abstract.token_ids):
        return False
    return not (abstract.pairs and _mixes_places(op))


def _mixes_features_alone(ids: Tensor) -> bool:
    """Whether channels are tokens, and a spatial axis is of features."""
    spatial = enumerate(ids.shape[2:], 2)
    return varies(ids, 1) and any(n > 1 and not varies(ids, axis) for axis, n in spatial)


def _of_map(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """Each window over a map of tokens becomes a token, made of those inside."""
    lines, out = distinct_along(abstract.token_ids[0], 1), op.results[0].shape[2:]
    windows = windows_read_by(op)
    centres = None
    if windows.regular:
        centres = centres_of(spaces, lines[:, 0], windows.starts, windows.steps, out)
    return on_map(spaces, abstract, op, elements_in(lines, windows, out), centres)


def _upsampled(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """Each place of a transposed convolution becomes a token of those whose kernels reach it."""
    lines = distinct_along(abstract.token_ids[0], 1)
    spatial, out = op.inputs[0].shape[2:], op.results[0].shape[2:]
    strides, margins, dilations = (
        each_axis(op.argument(place, name, default), len(out))
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (7, "dilation", 1))
    )
    along, starts, steps = [], [], []
    for axis, (n, m) in enumerate(zip(spatial, out, strict=True)):
        stride, margin = strides[axis], margins[axis]
        span = dilations[axis] * (op.inputs[1].shape[axis + 2] - 1)
        along.append(
            [
                range(
                    max(0, -(-(o + margin - span) // stride)),
                    min(n - 1, (o + margin) // stride) + 1,
                )
                for o in range(m)
            ]
        )
        starts.append((margin - span / 2) / stride)
        steps.append(1 / stride)
    if not all(len(r) for line in along for r in line):
        return abstract.without_tokens(op.name)  # places that no kernel reaches
    parents = elements_in(lines, Windows(along), out)
    centres = centres_of(spaces, lines[:, 0], starts, steps, out)
    return on_map(spaces, abstract, op, parents, centres)
