"""One token for each place of a map: convolutions and poolings that change the grid."""

from __future__ import annotations

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

    Where the grid is kept, each position keeps its token, which is an approximation of the docs.
    """
    operand, result = op.inputs[0], op.results[0]
    lost = abstract.without_tokens(op.name)
    spatial_axes = int(op.name[-2])
    if not abstract.token_ids or operand.ndim != spatial_axes + 2:
        return lost
    if abstract.role is Role.RAW:
        return lost if "transpose" in op.name else images.of_picture(spaces, abstract, op)
    if not abstract.role.of_tokens:
        return lost
    keeps_grid = operand.shape[2:] == result.shape[2:]
    apart = any(varies(ids, 1) for ids in abstract.token_ids)
    convolves = "conv" in op.name
    mixes_places = convolves and any(n > 1 for n in op.inputs[1].shape[2:])
    if keeps_grid and not apart and not (abstract.pairs and mixes_places):
        if mixes_places or not convolves:
            spaces.approximate("neighbourhood", op.name)
        return abstract.map(lambda ids: first_along(ids, 1).expand(result.shape))
    if abstract.pairs:
        return lost  # heads may be mixed, keys may not
    spatial = enumerate(operand.shape[2:], 2)
    if apart and any(n > 1 and not varies(abstract.token_ids[0], axis) for axis, n in spatial):
        return lost  # tokens are mixed, feature by feature
    return (
        _upsampled(spaces, abstract, op)
        if "transpose" in op.name
        else _of_map(spaces, abstract, op)
    )


def _of_map(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """Each window over a map of tokens becomes a token of those inside."""
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
