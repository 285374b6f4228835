"""The figure of a batch: a row for each example, a column for each target or method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from captum_generic_attn.visualization.areas import checked_boxes
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.heatmaps import darkest
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_picture,
    overlay,
    scale_bar,
)
from captum_generic_attn.visualization.words import title_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.compare import Attributions, Comparison

    Heats = Attributions | Sequence[ArrayLike] | NDArray[Any]

# In inches: a panel, narrower where there are many columns; the whole page.
_PANEL, _NARROWEST, _PAGE = 2.0, 1.6, 12.0
_SCALES = {
    "own": "own scale",
    "row": "the row's scale",
    "column": "column's scale",
    "all": "one scale for all",
}


def grid_figure(
    images: Sequence[ArrayLike | Image] | NDArray[Any],
    columns: Mapping[str, Heats] | Comparison,
    *,
    names: Sequence[str] = (),
    scale: Literal["own", "row", "column", "all"] = "own",
    part: int = 0,
    area: ArrayLike | None = None,
) -> NotebookFigure:
    """A figure of a batch: for each example its picture, then one overlay for each column.

    Red speaks for the score; blue, in methods that tell, against it. The darkest colours stand for
    the largest value among the maps that share a scale; of a `Comparison`, for that of the 99.5th
    percentiles, as in `comparison_figure`. The bars say which maps share one.

    Args:
        images: one for each example, each as `overlay` takes it; they may differ in size.
        columns: by title, what `attribute` returned for the batch, `[B, C, H, W]`; or a
            `Comparison`.
        names: of the examples; they stand beside the pictures.
        scale: `"own"`: each map its own; `"row"`: one for each example, to compare its targets;
            `"column"`: one for each column, to compare examples; `"all"`: one for all.
        part: which input holds the pictures, where a method returned several.
        area: the part of the pictures that the model saw, as in `overlay`: one box for all, or one
            for each.

    Raises:
        ValueError: no example or no column, not one map, name or area for each example, no such
            scale, or shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from captum_generic_attn.visualization import grid_figure
        >>> maps = torch.rand(2, 3, 8, 8)
        >>> figure = grid_figure(np.zeros((2, 8, 8)), {"bag": maps, "boot": maps}, names=["a", "b"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['', 'bag', 'boot']
        >>> [figure.axes[place].get_ylabel() for place in (0, 3)]
        ['a', 'b']
    """
    if scale not in _SCALES:
        raise ValueError(f"scale is one of {', '.join(map(repr, _SCALES))}, not {scale!r}")
    given: Mapping[str, Heats] = columns if isinstance(columns, Mapping) else columns.attributions
    cut = not isinstance(columns, Mapping)
    titles = list(given)
    if len(images) == 0 or not titles:
        raise ValueError(
            f"there is nothing to draw: {len(images)} pictures and {len(titles)} columns"
        )
    if names and len(names) != len(images):
        raise ValueError(f"{len(images)} pictures need as many names, not {len(names)}")
    pictures = [checked_picture(image) for image in images]
    areas = [None] * len(pictures) if area is None else checked_boxes(area, len(pictures))
    heats = [_maps(found, part, len(pictures), title) for title, found in given.items()]
    largest = darkest if cut else (lambda heat: float(np.abs(heat).max()))
    tops = np.array([[largest(heat) for heat in column] for column in heats]).T  # [B, columns]
    signed = np.array([[bool(heat.min() < 0) for heat in column] for column in heats]).T
    sharing = {"own": (), "row": (1,), "column": (0,), "all": (0, 1)}[scale]
    tops = np.broadcast_to(tops.max(axis=sharing, keepdims=True), tops.shape)
    signed = np.broadcast_to(signed.any(axis=sharing, keepdims=True), signed.shape)

    rows_of_bars = len(pictures) if scale in {"own", "row"} else 1
    figure, panels = _panels(pictures, titles, names, rows_of_bars)
    for row, (picture, box) in enumerate(zip(pictures, areas, strict=True)):
        panels[row, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        for column, axes in enumerate(panels[row, 1:]):
            heat, top, both = heats[column][row], tops[row, column], bool(signed[row, column])
            axes.imshow(overlay(picture, heat, area=box, maximum=top, signed=both))
    # Where each bar goes, and the scale of which map it shows.
    bars: list[tuple[Axes, tuple[int, int]]] = {
        "own": [(panels[row, column + 1], (row, column)) for row, column in np.ndindex(tops.shape)],
        "row": [(panels[row, 0], (row, 0)) for row in range(len(pictures))],
        "column": [(panels[-1, column + 1], (-1, column)) for column in range(len(titles))],
        "all": [(panels[-1, 0], (0, 0))],
    }[scale]
    for under, at in bars:
        least = -tops[at] if signed[at] else 0.0
        scale_bar(figure, under, least, tops[at], _SCALES[scale], cut=cut)
    return figure


def _maps(found: Heats, part: int, count: int, title: str) -> list[NDArray[np.float64]]:
    """`[H, W]` of each example."""
    batch = found[part] if isinstance(found, tuple) else found
    if len(batch) != count:
        raise ValueError(f"{title!r} has {len(batch)} maps for {count} pictures")
    return [checked_heat(heat) for heat in batch]


def _panels(
    pictures: list[NDArray[np.float64]], titles: list[str], names: Sequence[str], bars: int
) -> tuple[NotebookFigure, NDArray[np.object_]]:
    """The figure, with room for so many rows of bars, and its empty panels `[B, 1 + columns]`."""
    count = 1 + len(titles)
    panel = min(max(_PAGE / count, _NARROWEST), _PANEL)
    tall = [panel * picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = NotebookFigure(
        figsize=(panel * count, sum(tall) + 0.4 * bars + 0.06 * len(pictures) + 0.3),
        layout=ConstrainedLayoutEngine(compress=True, h_pad=0.06),
    )
    panels = figure.subplots(len(pictures), count, squeeze=False, height_ratios=tall)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, title in zip(panels[0, 1:], titles, strict=True):
        axes.set_title(_wrapped(title, panel, 10), fontsize=10, parse_math=False)
    for axes, name, height in zip(panels[:, 0], names, tall, strict=False):  # there may be none
        axes.set_ylabel(_wrapped(name, height, 9), fontsize=9, parse_math=False)
    return figure, panels


def _wrapped(text: str, room: float, size: float) -> str:
    """Broken into lines that leave some of so many inches free, as neighbours do."""
    return "\n".join(title_lines(text, 0.9 * 72 * room, size))
