"""Where tokens are born: embeddings, patch convolutions, projections of rows.

`transfer` asks these functions for the shadow of a result whose tokens did not exist before. Each
opens a space of `tokens.spaces` and says where its tokens lie in the input that they came from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.operations import Operation
from captum_generic_attn.capture.planes import first_along, varies, window_centres
from captum_generic_attn.capture.shadow import Role, Shadow
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_rows(spaces: TokenSpaces, shadow: Shadow, shape: torch.Size, name: str) -> Shadow:
    """Each row of the last axis becomes a token: a projection of region features or of patches."""
    (parents,) = shadow.planes
    plane = spaces.born_of_rows(parents, shadow.ancestors)
    if plane is None:
        return shadow.without_tokens(name)
    return replace(shadow, role=Role.TOKENS, planes=(plane.unsqueeze(-1).expand(shape),))


def of_integers(
    spaces: TokenSpaces, shadow: Shadow, weight: str, index: Tensor, result: Tensor, name: str
) -> Shadow:
    """Each integer becomes a token; of a parameter, if the integers come from no argument."""
    if not shadow.planes:
        rows = spaces.of_table(weight, index.detach().cpu())
        return Shadow(Role.TOKENS, (rows.unsqueeze(-1).expand(result.shape),))
    plane = spaces.born_of_rows(shadow.planes[0].unsqueeze(-1), shadow.ancestors)
    if plane is None:
        return shadow.without_tokens(name)
    planes = (plane.unsqueeze(-1).expand(result.shape),)
    return Shadow(Role.TOKENS, planes, shadow.ancestors, data=shadow.data)


def of_windows(spaces: TokenSpaces, shadow: Shadow, op: Operation) -> Shadow:
    """Each window of a convolution or pooling becomes a token, unless the grid stays the same."""
    operand, result = op.inputs[0], op.results[0]
    axes = int(op.name[-2])
    lost = shadow.without_tokens(op.name)
    if not shadow.planes or operand.ndim != axes + 2 or shadow.role < Role.RAW:
        return lost
    if shadow.role is not Role.RAW and any(varies(plane, 1) for plane in shadow.planes):
        return lost
    keeps_grid = operand.shape[2:] == result.shape[2:]
    mixes_places = "conv" in op.name and any(n > 1 for n in op.inputs[1].shape[2:])
    if shadow.role >= Role.LOGITS and (mixes_places or not keeps_grid):
        return lost  # heads may be mixed, keys may not
    if keeps_grid and shadow.role is not Role.RAW:
        return shadow.map(lambda plane: first_along(plane, 1).expand(result.shape))
    lines = shadow.planes[0][:, 0]
    one_parent = lines.reshape(len(lines), -1).amax(1).view(-1, *[1] * axes)
    parents = one_parent.expand(len(lines), *result.shape[2:])
    geometry = _windows(op)
    local = spaces.locate(lines)[2]
    centres = None
    if geometry is not None and bool((local == local[0]).all()):
        known = lines[0] >= 0
        centres = spaces.coordinates(torch.where(known, lines[0], lines[0].amax()))
        if centres is not None:
            centres = window_centres(centres, known, *geometry, result.shape[2:])
        if centres is not None:
            centres = centres.flatten(0, -2).repeat(len(lines), 1)
    plane = spaces.born(parents, centres, shadow.ancestors)
    if plane is None:
        return lost
    planes = (plane.unsqueeze(1).expand(result.shape),)
    return replace(shadow, role=Role.TOKENS, planes=planes)


def _windows(op: Operation) -> tuple[list[float], list[int]] | None:
    """Centre of the first window and distance of windows, along each spatial axis."""
    spatial, out = op.inputs[0].shape[2:], op.results[0].shape[2:]

    def each(value: Any) -> list[int]:
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in value * (len(out) if len(value) == 1 else 1)]

    if op.name.startswith("adaptive"):
        if any(n % m for n, m in zip(spatial, out, strict=True)):
            return None
        stride = [n // m for n, m in zip(spatial, out, strict=True)]
        return [(n - 1) / 2 for n in stride], stride
    if op.name.startswith("conv"):
        kernel = list(op.inputs[1].shape[2:])
        stride = each(op.argument(3, "stride", 1))
        padding = op.argument(4, "padding", 0)
        dilation = each(op.argument(5, "dilation", 1))
    else:
        kernel = each(op.argument(1, "kernel_size"))
        stride = each(op.argument(2, "stride") or kernel)
        padding = op.argument(3, "padding", 0)
        dilation = each(op.argument(4, "dilation", 1) if "max" in op.name else 1)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        margins = [span // 2 if padding == "same" else 0 for span in spans]
    else:
        margins = each(padding)
    return [span / 2 - margin for span, margin in zip(spans, margins, strict=True)], stride
