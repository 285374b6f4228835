"""Where tokens are born: embeddings, patch convolutions, projections of rows.

`transfer` asks these functions for the shadow of a result whose tokens did not exist before. Each
opens a space of `tokens.spaces` and says where its tokens lie in the input that they came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import Operation, on_cpu
from captum_generic_attn.capture.tracking.planes import (
    Windows,
    distinct_along,
    first_along,
    varies,
    window_centres,
    windows_of,
)
from captum_generic_attn.capture.tracking.shadow import Role, Shadow
from captum_generic_attn.tokens.spaces import (
    PADDING,
    Extent,
    TokenSpaces,
    along_of_all,
    moved_along,
    sums_along,
)


def of_rows(spaces: TokenSpaces, shadow: Shadow, shape: torch.Size, name: str) -> Shadow:
    """Each row of the last axis becomes a token: a projection of region features or of patches."""
    (parents,) = shadow.planes
    if shadow.role is Role.TOKENS:
        parents = distinct_along(parents, -1)
    plane = spaces.born_of_rows(parents)
    if plane is None:
        return unborn(spaces, shadow, parents, name)
    return shadow._replace(role=Role.TOKENS, planes=(plane.unsqueeze(-1).expand(shape),))


def unborn(spaces: TokenSpaces, shadow: Shadow, parents: Tensor, name: str) -> Shadow:
    """What is left where no tokens can be made of parents; some of them were lost before, or none.

    Where known and lost features were joined, the operation is named that lost some.
    """
    lost = [spaces[i].name for i in spaces.indices(parents) if spaces[i].kind == "unknown"]
    return shadow.without_tokens(lost[0]) if lost else shadow.irregular(name)


def of_integers(
    spaces: TokenSpaces, shadow: Shadow, weight: str, index: Tensor, name: str
) -> Shadow:
    """Each integer becomes a token; of a parameter, if it comes from no argument.

    Among integers of an argument, constants (the start token of a decoder) are tokens of their own.

    Returns:
        A shadow whose plane has the shape of the integers.
    """
    if not shadow.planes:
        if shadow.data:
            return shadow.without_tokens(name)
        return Shadow(Role.TOKENS, (spaces.of_table(weight, index.detach().cpu()),))
    plane = spaces.born_of_rows(shadow.planes[0].unsqueeze(-1))
    if plane is None:
        return shadow.irregular(name)
    if bool((plane < 0).any()):
        plane = torch.where(plane < 0, spaces.of_constants(weight, plane < 0), plane)
    return Shadow(Role.TOKENS, (plane,), shadow.ancestors, data=shadow.data)


def places_of_index(
    op: Operation, table: Tensor | None, index: Tensor, shape: torch.Size
) -> Tensor | None:
    """Which of the integers `index` each element of a looked-up result is of, as places in it.

    The operation is run on a table whose rows are these places; `None` if it is not one that picks
    rows along one axis.
    """
    places = torch.arange(index.numel()).view(index.shape)
    if op.name == "embedding":
        return places.unsqueeze(-1).expand(shape)
    if op.name in ("gather", "take", "take_along_dim"):
        return places.expand(shape)
    if table is None:
        return None
    axis, rest = 0, on_cpu(tuple(op.args[1:]))
    if op.name in ("index_select", "select"):
        axis = op.argument(1, "dim", 0)
        flat = places.flatten()
        rows = _rows_along(table, axis, index.numel())
        return rows.index_select(axis, flat)
    picked = rest[0] if rest else None
    parts = list(picked) if isinstance(picked, (tuple, list)) else [picked]
    lists = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    if op.name not in ("getitem", "index") or len(lists) != 1 or Ellipsis in parts[: lists[0]]:
        return None
    axis = lists[0]
    parts[axis] = places
    found = _rows_along(table, axis, index.numel())[tuple(
        slice(None) if part is None and op.name == "index" else part for part in parts
    )]  # fmt: skip
    return found if found.shape == shape else None


def _rows_along(table: Tensor, axis: int, count: int) -> Tensor:
    """`count` numbered rows along an axis of a table of otherwise the same shape."""
    shape = [1] * table.ndim
    shape[axis] = count
    size = [count if i == axis % table.ndim else n for i, n in enumerate(table.shape)]
    return torch.arange(count).view(shape).expand(size)


def laid_out(plane: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The tokens of integers where a look-up put them."""
    if places.stride(-1) == 0 and places.ndim > 1:
        return plane.reshape(-1)[places[..., 0]].unsqueeze(-1).expand(shape)
    return plane.reshape(-1)[places]


def of_elements(spaces: TokenSpaces, elements: Tensor, tokens: Tensor) -> Tensor | None:
    """Tokens of the elements of an input that meet others: one at each of these.

    Args:
        spaces: the register of tokens.
        elements: the plane of the elements.
        tokens: the plane, of the same shape, of the tokens that they meet.
    """
    features = [axis for axis in range(tokens.ndim) if not varies(tokens, axis)]
    places = [axis for axis in range(tokens.ndim) if axis not in features]
    narrow = elements
    for axis in features:
        if elements.stride(axis) == 0:
            narrow = narrow.narrow(axis, 0, 1)
    rows = narrow.permute(*places, *features)
    rows = rows.reshape(*[tokens.shape[axis] for axis in places], -1)
    plane = spaces.born_of_rows(rows)
    if plane is None:
        return None
    for axis in sorted(features):
        plane = plane.unsqueeze(axis)
    return plane.expand(tokens.shape)


def of_windows(spaces: TokenSpaces, shadow: Shadow, op: Operation) -> Shadow:
    """Each window of a convolution or pooling becomes a token, unless the grid stays the same."""
    operand, result = op.inputs[0], op.results[0]
    axes = int(op.name[-2])
    lost = shadow.without_tokens(op.name)
    if not shadow.planes or operand.ndim != axes + 2 or shadow.role < Role.RAW:
        return lost
    if shadow.role is Role.STATISTIC:
        return lost
    raw = shadow.role is Role.RAW
    keeps_grid = operand.shape[2:] == result.shape[2:]
    apart = not raw and any(varies(plane, 1) for plane in shadow.planes)
    if shadow.role >= Role.LOGITS:
        mixes_places = "conv" in op.name and any(n > 1 for n in op.inputs[1].shape[2:])
        if mixes_places or not keeps_grid or apart:
            return lost  # heads may be mixed, keys may not
    if keeps_grid and not raw and not apart:
        if "conv" not in op.name or any(n > 1 for n in op.inputs[1].shape[2:]):
            spaces.approximate("neighbourhood", op.name)
        return shadow.map(lambda plane: first_along(plane, 1).expand(result.shape))
    if apart and any(
        n > 1 and not varies(shadow.planes[0], axis + 2) for axis, n in enumerate(operand.shape[2:])
    ):  # fmt: skip
        return lost  # tokens are mixed, feature by feature
    if raw:
        return lost if "transpose" in op.name else _of_picture(spaces, shadow, op)
    lines = distinct_along(shadow.planes[0], 1)
    if "transpose" in op.name:
        return _upsampled(spaces, shadow, op, lines)
    windows = _windows(op)
    parents = windows_of(lines, windows, result.shape[2:])
    centres = None
    if windows.regular:
        steps = windows.starts, windows.steps
        centres = _centres(spaces, lines[:, 0], *steps, result.shape[2:])
    return _born_on_map(spaces, shadow, op, parents, centres)


def _upsampled(spaces: TokenSpaces, shadow: Shadow, op: Operation, lines: Tensor) -> Shadow:
    """Each place of a transposed convolution becomes a token of those whose kernels reach it."""
    spatial, out = op.inputs[0].shape[2:], op.results[0].shape[2:]
    strides, margins, dilations = (
        _each(op.argument(place, name, default), len(out))
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
        return shadow.without_tokens(op.name)  # places that no kernel reaches
    parents = windows_of(lines, Windows(along), out)
    centres = _centres(spaces, lines[:, 0], starts, steps, out)
    return _born_on_map(spaces, shadow, op, parents, centres)


def _of_picture(spaces: TokenSpaces, shadow: Shadow, op: Operation) -> Shadow:
    """Each window of the elements of an input becomes a token.

    Channels may be of several inputs (bands, two dates), each of which makes tokens; at one place
    they are one token.
    """
    plane = shadow.planes[0]
    windows = _windows(op)
    channels = _channels_by_input(spaces, plane)
    if channels is None:
        return shadow.irregular(f"{op.name} of channels whose elements lie at different places")
    together: Shadow | None = None
    for alike in channels:
        born = _of_channels(spaces, shadow, op, plane[:, alike], windows)
        if together is None or not born.planes:
            together = born
        elif not spaces.same(together.planes[0], born.planes[0]):
            return shadow.irregular(op.name)
        if not born.planes:
            break
    assert together is not None  # noqa: S101 - a picture has a channel
    return together


def _of_channels(
    spaces: TokenSpaces, shadow: Shadow, op: Operation, plane: Tensor, windows: Windows
) -> Shadow:
    """Tokens of the windows over channels `[B, c, *spatial]`, whose rows may be of several inputs.

    Two pictures that are joined along the batch go through one convolution.
    """
    out = op.results[0].shape
    lines = plane[:, 0]
    one = lines.reshape(len(lines), -1).amax(1)  # any element will do to tell the picture
    owner = spaces.locate(one)[0]
    together: Shadow | None = None
    for i in torch.unique(owner).tolist():
        mine = torch.where(owner == i, one, PADDING).view(-1, *[1] * (lines.ndim - 1), 1)
        centres = extent = None
        if windows.regular:
            steps = windows.starts, windows.steps
            centres = _of_own(owner == i, _centres(spaces, lines[owner == i], *steps, out[2:]))
        if centres is not None:
            extent = _extent(spaces, plane[owner == i], windows, out[2:])
            apart = _apart(spaces, plane[owner == i])
            if apart is not None:  # in the middle of the channels
                centres = centres + (apart.amin(0) + apart.amax(0)) / 2
        if extent is not None:
            ranges = _of_own(owner == i, extent.ranges)
            assert ranges is not None  # noqa: S101 - they are known
            extent = extent._replace(ranges=ranges)
        mine = mine.expand(len(lines), *out[2:], 1)
        born = _born_on_map(spaces, shadow, op, mine, centres, extent)
        if not born.planes:
            return born
        if together is not None:
            born = born.map(partial(_filled, together.planes[0]))
        together = born
    assert together is not None  # noqa: S101 - a channel has rows
    return together


def _of_own(own: Tensor, values: Tensor | None) -> Tensor | None:
    """Values of some rows of a batch, as values of all."""
    if values is None or bool(own.all()):
        return values
    every = values.new_zeros(len(own), *values.shape[1:])
    every[own] = values
    return every


def _filled(plane: Tensor, other: Tensor) -> Tensor:
    """A plane whose padding is filled from another."""
    return torch.where(plane >= 0, plane, other)


def _channels_by_input(spaces: TokenSpaces, plane: Tensor) -> list[list[int]] | None:
    """The channels of each input in a plane `[B, C, *spatial]` of elements.

    `None` if the channels of an input hold elements of different places.
    """
    corner = plane[(slice(None), slice(None), *[slice(0, 1)] * (plane.ndim - 2))]
    shifted = plane - corner  # [B, C, *spatial]: as far from the corner in each channel
    same = (shifted == shifted[:, :1]) | ((plane < 0) & (plane[:, :1] < 0))
    if not bool(same.all()):
        padding = plane < 0
        if not bool(padding.any()):
            return None
        # The corner is padding: compare with the first element that is none.
        known = (~padding[0, 0]).flatten().nonzero()
        if not len(known) or not bool((padding == padding[:, :1]).all()):
            return None
        flat = plane.flatten(2)
        shifted = flat - flat[:, :, int(known[0]), None]
        kept = ~padding.flatten(2)
        if not bool(((shifted == shifted[:, :1]) | ~kept).all()):
            return None
    middle = plane[0].flatten(1).amax(1)
    index = spaces.locate(middle)[0]
    return [(index == i).nonzero().flatten().tolist() for i in dict.fromkeys(index.tolist())]


def _extent(spaces: TokenSpaces, plane: Tensor, windows: Windows, out: torch.Size) -> Extent | None:
    """The elements in windows `[B, *out]` over channels `[B, c, *spatial]`, which are alike.

    `None` if that cannot be told.
    """
    groups = _rows_alike(spaces, plane[:, 0])
    parts = [_extent_of_alike(spaces, plane[rows], windows, out) for rows in groups]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    for one, other in combinations(found, 2):
        for axis, (mine, theirs) in enumerate(zip(one.along, other.along, strict=True)):
            first, last = other.ranges[..., axis, 0].min(), other.ranges[..., axis, 1].max()
            if not bool((mine & theirs).any()) and bool(mine[first : last + 1].any()):
                return None  # channels that stand among those of other tokens
    ranges = found[0].ranges.new_zeros(len(plane), *found[0].ranges.shape)
    for rows, part in zip(groups, found, strict=True):
        ranges[rows] = part.ranges
    return Extent(ranges, along_of_all(found))


def _apart(spaces: TokenSpaces, plane: Tensor) -> Tensor | None:
    """`[c, d]`, how far each of the channels of `[B, c, *spatial]` lies from the first."""
    known = (plane[0, 0].flatten() >= 0).nonzero().flatten()
    channels = spaces.coordinates(plane[0].flatten(1)[:, int(known[0])])
    return None if channels is None else (channels - channels[0]).long()


def _extent_of_alike(
    spaces: TokenSpaces, plane: Tensor, windows: Windows, out: torch.Size
) -> Extent | None:
    """The elements in windows `[*out]` over channels `[B, c, *spatial]` of the same places."""
    lines = plane[:, 0]
    apart = _apart(spaces, plane)
    source = spaces[spaces.indices(lines)[0]]
    if apart is None:
        return None
    lattice = spaces.lattice(lines)
    if lattice is None or source.shape is None:
        rows = windows_of(lines[:1].unsqueeze(1), windows, out)
        found = spaces.extent(rows.flatten(0, -2))
        if found is None:
            return None
        ranges = found.ranges.view(*out, -1, 2)
        along = found.along if source.shape is None else moved_along(found.along, apart)
    else:
        origin, slopes = lattice
        ranges = origin.new_zeros(*[1] * len(out), len(origin), 2) + origin.unsqueeze(-1)
        parts = [origin.unsqueeze(0), apart]
        for axis, (line, n) in enumerate(zip(windows.along, lines.shape[1:], strict=True)):
            inside = [[i for i in r if 0 <= i < n] or [min(max(r[0], 0), n - 1)] for r in line]
            ends = torch.tensor([[i[0], i[-1]] for i in inside], dtype=origin.dtype)
            reach = (ends.unsqueeze(1) * slopes[axis].unsqueeze(-1)).sort(-1).values
            here = [len(line) if a == axis else 1 for a in range(len(out))]
            ranges = ranges + reach.view(*here, len(origin), 2)
            read = torch.tensor(sorted({i for places in inside for i in places}))
            parts.append(read.unsqueeze(-1) * slopes[axis])
        along = sums_along(parts, source.shape)
    return Extent(ranges.long() + torch.stack([apart.amin(0), apart.amax(0)], -1), along)


def _rows_alike(spaces: TokenSpaces, lines: Tensor) -> list[Tensor]:
    """The rows of maps `[B, *spatial]` that lie at the same places of their examples.

    All, or those of one frame, where the frames of an example follow each other in the batch.
    """
    places = spaces.locate(lines.flatten(1).amax(1))[2]
    return [(places == place).nonzero().flatten() for place in torch.unique(places)]


def _centres(
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


def _born_on_map(
    spaces: TokenSpaces, shadow: Shadow, op: Operation, parents: Tensor, centres: Tensor | None,
    extent: Extent | None = None,
) -> Shadow:  # fmt: skip
    """Tokens of a map `[B, C, *out]`.

    Of `[B, *out, m]` parents, with centres `[B, *out, d]`, and ranges `[B, *out, d, 2]` in the
    extent, if it is not that of the parents.
    """
    plane = spaces.born(parents, centres, extent)
    if plane is None:
        return unborn(spaces, shadow, parents, op.name)
    planes = (plane.unsqueeze(1).expand(op.results[0].shape),)
    return shadow._replace(role=Role.TOKENS, planes=planes)


def of_groups(spaces: TokenSpaces, shadow: Shadow, op: Operation, axes: Sequence[int]) -> Shadow:
    """Tokens that are averaged or summed along an axis become one token."""
    (plane,) = shadow.planes
    axes = [axis % plane.ndim for axis in axes]
    kept = [axis for axis in range(plane.ndim) if axis not in axes]
    small = [n if varies(plane, axis) else 1 for axis, n in enumerate(plane.shape)]
    rows = plane[tuple(slice(n) for n in small)].permute(*kept, *axes)
    rows = rows.reshape(*[small[axis] for axis in kept], -1)
    parents = spaces.born_of_rows(distinct_along(rows, -1))
    if parents is None:
        return unborn(spaces, shadow, rows, op.name)
    if op.results[0].ndim == plane.ndim:  # keepdim
        for axis in sorted(axes):
            parents = parents.unsqueeze(axis)
    return shadow._replace(planes=(parents.expand(op.results[0].shape),))


def of_resized(spaces: TokenSpaces, shadow: Shadow, op: Operation) -> Shadow:
    """Each place of a resized map becomes a token of the one that it lies in.

    A resized picture has elements of its own, which lie where they were in the picture.
    """
    operand, result = op.inputs[0], op.results[0]
    shadow = shadow._replace(calls=None, weighing=None)
    lost = shadow.without_tokens(op.name)
    if operand.shape == result.shape:
        return shadow
    if len(shadow.planes) != 1:
        return lost  # keys may not be mixed
    plane = shadow.planes[0]
    if operand.ndim < 3 or shadow.role not in (Role.RAW, Role.TOKENS):
        return lost
    raw = shadow.role is Role.RAW
    if not raw and varies(plane, 1):
        return lost
    lines = plane[:, 0]
    steps = [n / m for n, m in zip(operand.shape[2:], result.shape[2:], strict=True)]
    starts = [(step - 1) / 2 for step in steps]
    centres = _centres(spaces, lines, starts, steps, result.shape[2:])
    if raw:
        sampled = _sampled(op, operand.shape[2:], result.shape[2:])
        extent = _extent(spaces, plane[:, :1], sampled, result.shape[2:])
        if centres is None or extent is None:
            return lost
        if any(n > 2 * m for n, m in zip(operand.shape[2:], result.shape[2:], strict=True)):
            spaces.approximate("neighbourhood", op.name)
        picture = spaces.of_picture(plane, centres, extent, result.shape)
        return shadow._replace(planes=(picture,))
    spaces.approximate("neighbourhood", op.name)
    nearest = F.interpolate(lines[:, None].double(), result.shape[2:], mode="nearest-exact")
    parents = nearest[:, 0].to(plane.dtype).unsqueeze(-1)
    return _born_on_map(spaces, shadow, op, parents, centres)


def _sampled(op: Operation, spatial: torch.Size, out: torch.Size) -> Windows:
    """What each place of a resized map reads: the part that it stands for, and its neighbours."""
    taps = 2 if op.argument(3, "mode", "nearest") == "bicubic" else 1
    smooth = bool(op.argument(6, "antialias", False))
    along = []
    for n, m in zip(spatial, out, strict=True):
        half = max(n / m / 2, taps * (max(n / m, 1) if smooth else 1) - 1e-6)
        middles = [(i + 0.5) * n / m - 0.5 for i in range(m)]
        along.append([range(math.ceil(c - half), math.floor(c + half) + 1) for c in middles])
    return Windows(along)


def of_sums(spaces: TokenSpaces, one: Tensor, other: Tensor) -> Tensor | None:
    """Two sequences of tokens, each with a history of its own, are added: a plane of new tokens."""
    shape = one.shape
    for axis, n in enumerate(shape):  # features, be they written out
        first = [plane.narrow(axis, 0, min(1, n)) for plane in (one, other)]
        if (
            n
            and torch.equal(one, first[0].expand_as(one))
            and torch.equal(other, first[1].expand_as(other))
        ):
            one, other = first
    pairs = torch.stack([one, other], -1)
    pairs = torch.where((one == other).unsqueeze(-1), PADDING, pairs)  # a token stays itself
    born = spaces.born_of_rows(pairs)
    return None if born is None else torch.where(one == other, one, born).expand(shape)


def _windows(op: Operation) -> Windows:
    """The windows that a convolution or pooling reads, along each spatial axis."""
    spatial, out = op.inputs[0].shape[2:], op.results[0].shape[2:]

    if op.name.startswith("adaptive"):
        first = [[i * n // m for i in range(m)] for n, m in zip(spatial, out, strict=True)]
        last = [[-(-(i + 1) * n // m) for i in range(m)] for n, m in zip(spatial, out, strict=True)]
        return Windows(
            [[range(*ends) for ends in zip(*pair, strict=True)]
             for pair in zip(first, last, strict=True)]
        )  # fmt: skip
    if op.name.startswith("conv"):
        kernel = list(op.inputs[1].shape[2:])
        stride = _each(op.argument(3, "stride", 1), len(out))
        padding = op.argument(4, "padding", 0)
        dilation = _each(op.argument(5, "dilation", 1), len(out))
    else:
        kernel = _each(op.argument(1, "kernel_size"), len(out))
        stride = _each(op.argument(2, "stride") or kernel, len(out))
        padding = op.argument(3, "padding", 0)
        dilation = _each(op.argument(4, "dilation", 1) if "max" in op.name else 1, len(out))
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        margins = [span // 2 if padding == "same" else 0 for span in spans]
    else:
        margins = _each(padding, len(out))
    return Windows(
        [
            [range(i * s - m, i * s - m + span + 1, d) for i in range(n)]
            for n, s, m, span, d in zip(out, stride, margins, spans, dilation, strict=True)
        ]
    )


def _each(value: Any, axes: int) -> list[int]:
    """One number for each of the axes, of one for all or of one for each."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in numbers * (axes if len(numbers) == 1 else 1)]
