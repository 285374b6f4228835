"""Figures of attention layers and heads: how much each contributes, and what it attends to.

Both draw what `relevance(..., keep_calls=True)` returns.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from captum_generic_attn.visualization.call_maps import (
    check_kept,
    check_one_stream,
    chosen_calls,
    maps_of,
    of_keys,
    sums_of_heads,
)
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import checked_image, scale_bar, show_map, steps
from captum_generic_attn.visualization.regions import boxes_on, draw_regions
from captum_generic_attn.visualization.scales import Scale
from captum_generic_attn.visualization.titles import title_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.relevance.result import Call, Relevance

# Lengths are in inches, unless noted.
_CELL = 0.3  # a cell of the table of heads
_PANEL = 1.05  # the panel of one head
_LINE, _LARGEST = 0.03, 2.0  # a token in a whole map, and the largest side of such a map
_LONGEST = 28  # the longest name of a stream, in letters
_LETTERS, _TITLE = 11, 0.19  # the font size of a title, in points; each further line of it
_NAME = 1.5  # the name of a call beside its row


def layers_figure(relevance: Relevance, *, example: int = 0, title: str = "") -> NotebookFigure:
    """A figure of how much each head of each attention call contributes to the score.

    A cell is the sum of the head's map (`Call.per_head`: `relu(∇A ⊙ A)`) over all queries and keys.
    To first order, the score would lose that amount without the attention that supports it. All
    cells have the unit of the score, so they can be compared. There is a table for each pair of
    streams, "query ← key"; its rows are the calls in execution order. Calls that were not used are
    hatched, with the reasons below. Heads that a call does not have are white.

    Args:
        relevance: the result of `relevance(..., keep_calls=True)`.
        example: index in the batch.
        title: title of the figure.

    Raises:
        ValueError: the maps of the calls were not kept, or have no heads.
        IndexError: there is no such example.

    Example:
        >>> import torch
        >>> from captum_generic_attn import GenericAttention
        >>> from captum_generic_attn.visualization import layers_figure
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = lambda tokens: layer(tokens)[:, 0]
        >>> method = GenericAttention(model)
        >>> relevance = method.relevance(torch.rand(1, 4, 8), target=3, keep_calls=True)
        >>> figure = layers_figure(relevance)
        >>> figure.axes[0].get_title(), figure.axes[0].images[0].get_array().shape
        ('tokens ← tokens', (1, 2))
    """
    check_kept(relevance)
    tables: dict[str, list[Call]] = {}
    for call in relevance.calls:
        if call.heads:  # a refused call has no heads
            tables.setdefault(_pair(call), []).append(call)
    sums = {name: sums_of_heads(relevance, calls, example) for name, calls in tables.items()}
    # Tables may have no call that was used.
    used = [float(value) for values in sums.values() for value in values[~np.isnan(values)]]
    scale = Scale(max(used, default=0.0))
    reasons = list(dict.fromkeys(call.reason for call in relevance.calls if not call.used))

    widths = [values.shape[1] * _CELL for values in sums.values()]
    tall = max(map(len, tables.values())) * _CELL
    wide = max(sum(widths) + _NAME * len(widths), 4)
    heading, room = _over_all(title, wide)
    size = wide, tall + 1.3 + 0.2 * len(reasons) + room
    figure = NotebookFigure(figsize=size, layout="constrained")
    places = figure.add_gridspec(2, len(tables), width_ratios=widths, height_ratios=[tall, 0.09])
    for column, (name, values) in enumerate(sums.items()):
        axes = figure.add_subplot(places[0, column])
        axes.set_title(name, fontsize=9, parse_math=False)
        _draw_table(axes, values, tables[name], scale)
    bar = figure.add_subplot(places[1, :])
    scale_bar(figure, bar, scale, "map of a head, summed over queries and keys", fill=True)
    if reasons:
        figure.legend(
            handles=[_hatched(label=f"not used: {_clipped(reason)}") for reason in reasons],
            loc="outside lower left", fontsize=8, frameon=False,
        )  # fmt: skip
    figure.suptitle(heading, fontsize=_LETTERS, parse_math=False)
    return figure


def _draw_table(
    axes: Axes, values: NDArray[np.float64], calls: Sequence[Call], scale: Scale
) -> None:
    """Draw the sums of the heads, one row per call."""
    axes.imshow(values, cmap=steps(), vmin=0, vmax=scale.maximum or 1)
    axes.set_anchor("N")
    heads = values.shape[1]
    axes.set_xlabel("head", fontsize=8)
    axes.set_xticks(range(0, heads, 1 + heads // 20))
    axes.set_yticks(range(len(values)), _short(calls), parse_math=False)
    axes.tick_params(labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    for row, call in enumerate(calls):
        if not call.used:
            axes.add_patch(_hatched((-0.5, row - 0.5), call.heads, 1))


def heads_figure(
    relevance: Relevance,
    *,
    query: int | None = None,
    key: str | None = None,
    grid: tuple[int, int] | None = None,
    boxes: ArrayLike | None = None,
    image: ArrayLike | Image | None = None,
    crop_box: ArrayLike | None = None,
    calls: Iterable[int] | None = None,
    example: int = 0,
    title: str = "",
) -> NotebookFigure:
    """A figure of the maps of all heads, one row per attention call.

    A row begins with the mean over heads (Ā of eq. 5), followed by each head (`Call.per_head`:
    `relu(∇A ⊙ A)`). It has its own scale; the value of the darkest colour is given beside it.

    Without `query`, a panel shows the whole map, queries down and keys across, in the order of
    their streams. Calls in windows are combined; tokens that share no window have 0. With `query`,
    a panel shows the map's row of that token, laid out on a `grid` of patches or on the `boxes` of
    regions.

    Args:
        relevance: the result of `relevance(..., keep_calls=True)`.
        query: the position of a token in its stream, as in `Call.query_tokens`; 0 is often a class
            token.
        key: the part of the key stream to draw, by its name in `Stream.parts`; by default the whole
            stream. If a class token precedes the patches, name the part of the patches.
        grid: rows and columns of the patches, which cover the image row by row. Over an `image`
            they are interpolated as in `attribute`; otherwise each patch is a cell.
        boxes: (left, top, right, bottom) of each region in pixels of `image`.
        image: the image under the maps, as for `overlay`; required with boxes.
        crop_box: the part of the image that the model saw, as in `overlay`: the grid covers it.
        calls: the `index` of each call to draw; by default all calls that were used.
        example: index in the batch.
        title: title of the figure.

    Raises:
        ValueError: the maps of the calls were not kept or have no heads; a call was not used, or
            does not have that query; or the number of keys does not match the grid or the boxes.
        IndexError: there is no such example or call.

    Example:
        >>> import torch
        >>> from captum_generic_attn import GenericAttention
        >>> from captum_generic_attn.visualization import heads_figure
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = lambda tokens: layer(tokens)[:, 0]
        >>> method = GenericAttention(model)
        >>> relevance = method.relevance(torch.rand(1, 6, 8), target=3, keep_calls=True)
        >>> figure = heads_figure(relevance, query=0, grid=(2, 3))
        >>> [axes.get_title() for axes in figure.axes]
        ['mean', 'head 0', 'head 1']
        >>> figure.axes[1].images[0].get_array().shape
        (2, 3)
    """
    check_kept(relevance)
    chosen = chosen_calls(relevance, calls)
    if query is None:
        if any(given is not None for given in (key, grid, boxes, image)):
            raise ValueError(
                "key=, grid=, boxes= and image= lay out the keys of one query token: give query= "
                "as well, the token's position in its stream"
            )
    else:
        check_one_stream(chosen)
    layout = _layout(query, grid, boxes, image, crop_box)
    wide, tall = _size_of_panels(layout, chosen)

    columns = 1 + max(call.heads for call in chosen)
    across = _NAME + columns * wide
    heading, room = _over_all(title, across)
    figure = NotebookFigure(
        figsize=(across, len(chosen) * (tall + 0.08) + 0.6 + room), layout="constrained"
    )
    panels = figure.subplots(len(chosen), columns, squeeze=False)
    mixed = len(set(map(_pair, chosen))) > 1
    for row, call, name in zip(panels, chosen, _short(chosen), strict=True):
        maps = maps_of(relevance, call, example)
        heats = (
            maps.values
            if query is None
            else of_keys(relevance, call, maps, query, key, layout.grid, layout.boxes)
        )
        most = float(heats.max())
        for axes, heat in zip(row, heats, strict=False):
            _draw(axes, heat, Scale(most), layout)
        for axes in row[len(heats) :]:
            axes.set_axis_off()
        streams = f"{_pair(call)}\n" if mixed else ""
        row[0].annotate(
            f"{name}\n{streams}0 … {most:.2g}", (0, 0.5), (-14, 0), xycoords="axes fraction",
            textcoords="offset points", fontsize=7, ha="right", va="center", parse_math=False,
        )  # fmt: skip
    _name_panels(panels, whole=query is None)
    figure.suptitle(heading, fontsize=_LETTERS, parse_math=False)
    return figure


class _Layout(NamedTuple):
    """The layout of the keys of one query: on a grid or in boxes, possibly over an image.

    If all fields are `None`, panels show whole maps.
    """

    grid: tuple[int, int] | None = None
    boxes: NDArray[np.float64] | None = None
    image: NDArray[np.float64] | None = None
    crop_box: ArrayLike | None = None


def _layout(
    query: int | None, grid: tuple[int, int] | None, boxes: ArrayLike | None,
    image: ArrayLike | Image | None, crop_box: ArrayLike | None,
) -> _Layout:  # fmt: skip
    """Check the options of `heads_figure` for the layout of keys."""
    if query is not None and (grid is None) == (boxes is None):
        raise ValueError(
            "the keys of one query token are laid out on a grid=(rows, columns) of patches, or on "
            "the boxes= of regions: give one of them"
        )
    array = None if image is None else checked_image(image)
    if boxes is not None and array is None:
        raise ValueError("boxes= are drawn on an image: give image= as well")
    if crop_box is not None and (array is None or grid is None):
        raise ValueError(
            "crop_box= is the part of image= that grid= covers: give both of them as well"
        )
    placed = None if boxes is None or array is None else boxes_on(boxes, array)
    return _Layout(grid, placed, array, crop_box)


def _size_of_panels(layout: _Layout, calls: Sequence[Call]) -> tuple[float, float]:
    """Width and height of a panel in inches."""
    if layout.image is not None:
        height, width = layout.image.shape[:2]
        return _PANEL, _PANEL * height / width
    if layout.grid is not None:
        return _PANEL, _PANEL * layout.grid[0] / layout.grid[1]
    # A token of a whole map is a line, which must be visible.
    longest = max(max(call.query_tokens.shape[1], call.key_tokens.shape[1]) for call in calls)
    side = min(max(_PANEL, longest * _LINE), _LARGEST)
    return side, side


def _name_panels(panels: NDArray[np.object_], *, whole: bool) -> None:
    """Write the titles of the columns, and the axis labels of whole maps."""
    for column, axes in enumerate(panels[0]):
        axes.set_title(f"head {column - 1}" if column else "mean", fontsize=8)
    if whole:
        for axes in panels[:, 0]:
            axes.set_ylabel("query", fontsize=7, labelpad=1)
        for axes in panels[-1]:
            axes.set_xlabel("key", fontsize=7, labelpad=1)


def _draw(axes: Axes, heat: NDArray[np.float64], scale: Scale, layout: _Layout) -> None:
    if layout.image is None:
        axes.imshow(heat, cmap=steps(), vmin=0, vmax=scale.maximum or 1)
    elif layout.boxes is None:
        whole = 0, 0, layout.image.shape[1], layout.image.shape[0]
        crop_box = whole if layout.crop_box is None else layout.crop_box
        show_map(axes, layout.image, heat, scale, crop_box)
    else:
        draw_regions(axes, layout.image, layout.boxes, heat, scale.maximum)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="0.8", position=("outward", 1))  # must not hide the first token


def _over_all(title: str, wide: float) -> tuple[str, float]:
    """Break a title into lines for a figure `wide` inches wide; also the height of
    further lines.
    """
    lines = title_lines(title, 72 * 0.95 * wide, _LETTERS)
    return "\n".join(lines), _TITLE * (len(lines) - 1)


def _hatched(
    corner: tuple[float, float] = (0, 0), wide: float = 1, tall: float = 1, label: str = ""
) -> Rectangle:
    """A hatched box, which stands for heads that were not used."""
    return Rectangle(
        corner, wide, tall, facecolor="0.9", edgecolor="0.65", hatch="////", linewidth=0,
        label=label,
    )  # fmt: skip


def _pair(call: Call) -> str:
    """The names of a call's streams, in two lines if they are long."""
    query, key = (
        name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
        for name in (call.query_stream, call.key_stream)
    )
    return f"{query} ← {key}" if len(query + key) <= _LONGEST else f"{query}\n← {key}"


def _short(calls: Sequence[Call]) -> list[str]:
    """The module paths of calls without their common prefix and suffix.

    The prefix keeps its last name before a number: "blocks" in "blocks.0".
    """
    paths = [(call.module or "forward").split(".") for call in calls]
    if len(set(map(tuple, paths))) < 2:
        return [".".join(path) for path in paths]
    start = _alike(paths)
    if start and paths[0][start].isdigit():  # "blocks.0" is clearer than "0"
        start -= 1
    end = _alike([path[start + 2 :][::-1] for path in paths])
    return [".".join(path[start : len(path) - end]) for path in paths]


def _alike(paths: Sequence[Sequence[str]]) -> int:
    """The length of the common prefix of all paths."""
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))


def _clipped(reason: str) -> str:
    return reason if len(reason) <= 80 else f"{reason[:79]}…"
