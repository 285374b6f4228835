"""The figure of a batch: one row per example, one column per target or method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL.Image import Image

from captum_generic_attn.visualization.crop_boxes import checked_boxes
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_image,
    scale_bar,
    show_image,
    show_map,
)
from captum_generic_attn.visualization.scales import ONE, OWN, darkest, largest, scale_of
from captum_generic_attn.visualization.titles import checked_titles, title_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from captum_generic_attn.comparison import Attributions, Comparison

    Heats = Attributions | Sequence[ArrayLike] | NDArray[Any]

# Widths in inches: a panel, a panel where there are many columns, and the page.
_PANEL, _NARROWEST, _PAGE = 2.0, 1.6, 12.0
_LETTERS, _TITLE = 11, 0.2  # the title's font size in points, and its line height in inches
_SCALES = {
    "own": OWN,
    "row": "the row's scale",
    "column": "column's scale",
    "all": ONE,
}


def grid_figure(
    images: Sequence[ArrayLike | Image] | NDArray[Any],
    columns: Mapping[str, Heats] | Comparison,
    *,
    names: Sequence[str] = (),
    title: str = "",
    scale: Literal["own", "row", "column", "all"] = "own",
    part: int = 0,
    crop_box: ArrayLike | None = None,
) -> NotebookFigure:
    """A figure of a batch: for each example its image, then one overlay for each column.

    Red marks evidence for the score; blue, in signed methods, evidence against it. The darkest
    colours stand for the largest value of the maps that share a scale. For a `Comparison` they
    stand for the largest of the maps' 99.5th percentiles, as in `comparison_figure`. The colour
    bars say which maps share a scale.

    Args:
        images: one per example, each as for `overlay`; they may differ in size.
        columns: a mapping from titles to what `attribute` returned for the batch, `[B, C, H, W]`;
            or a `Comparison`.
        names: names of the examples, drawn beside the images.
        title: title of the figure.
        scale: which maps share a scale: `"own"`: none; `"row"`: those of an example, to compare its
            targets; `"column"`: those of a column, to compare examples; `"all"`: all.
        part: index of the input that holds the images, where a method returned several.
        crop_box: the part of the images that the model saw, as in `overlay`: one box for all, or
            one for each.

    Raises:
        TypeError: `images` is one image, or names are no sequence of strings.
        ValueError: there is no example or no column, there is not one map, name or crop box for
            each example, the scale is unknown, or shapes do not fit.

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
    top = largest if isinstance(columns, Mapping) else darkest
    heats = _checked_maps(images, given, part)
    if len(names) > 0:
        names = checked_titles(names, len(images), of="images", name="names")
    arrays = [checked_image(image) for image in images]
    crop_boxes = [None] * len(arrays) if crop_box is None else checked_boxes(crop_box, len(arrays))
    sharing = _sharing(scale, len(arrays), len(heats))
    scales = {
        shared: scale_of([heats[column][row] for row, column in cells], top)
        for shared, cells in sharing.items()
    }
    of_cell = {cell: scales[shared] for shared, cells in sharing.items() for cell in cells}

    rows_of_bars = len(arrays) if scale in {"own", "row"} else 1
    figure, panels = _panels(arrays, list(given), names, rows_of_bars, title)
    for row, (array, box) in enumerate(zip(arrays, crop_boxes, strict=True)):
        show_image(panels[row, 0], array)
        for column, axes in enumerate(panels[row, 1:]):
            show_map(axes, array, heats[column][row], of_cell[row, column], box)
    # The axes for the colour bar of each scale.
    under: dict[str, Callable[[Any], Axes]] = {
        "own": lambda at: panels[at[0], at[1] + 1],
        "row": lambda row: panels[row, 0],
        "column": lambda column: panels[-1, column + 1],
        "all": lambda _: panels[-1, 0],
    }
    for shared, found in scales.items():
        scale_bar(figure, under[scale](shared), found, "", _SCALES[scale])
    return figure


def _checked_maps(
    images: Sequence[ArrayLike | Image] | NDArray[Any], columns: Mapping[str, Heats], part: int
) -> list[list[NDArray[np.float64]]]:
    """The maps of each column, one per image."""
    if isinstance(images, Image) or getattr(images, "ndim", 4) < 3:
        raise TypeError("images= takes a sequence of images: for a single image, give [image]")
    if len(images) == 0 or not columns:
        raise ValueError(
            f"there is nothing to draw: {len(images)} images and {len(columns)} columns"
        )
    maps = {
        name: found[part] if isinstance(found, tuple) else found for name, found in columns.items()
    }
    for name, batch in maps.items():
        if len(batch) != len(images):
            raise ValueError(
                f"{name!r} has {len(batch)} maps for {len(images)} images; for a single image, "
                "pass images=[image]"
            )
    return [[checked_heat(heat) for heat in batch] for batch in maps.values()]


def _sharing(scale: str, rows: int, columns: int) -> dict[Any, list[tuple[int, int]]]:
    """The cells (row, column) that share a scale."""
    cells: dict[Any, list[tuple[int, int]]] = {}
    for row, column in np.ndindex(rows, columns):
        key = {"own": (row, column), "row": row, "column": column, "all": None}[scale]
        cells.setdefault(key, []).append((row, column))
    return cells


def _panels(
    arrays: list[NDArray[np.float64]],
    titles: list[str],
    names: Sequence[str],
    bars: int,
    title: str,
) -> tuple[NotebookFigure, NDArray[np.object_]]:
    """The figure, with room for the rows of bars, and its empty panels `[B, 1 + columns]`."""
    count = 1 + len(titles)
    panel = min(max(_PAGE / count, _NARROWEST), _PANEL)
    tall = [panel * array.shape[0] / array.shape[1] for array in arrays]
    heading = title_lines(title, 0.95 * 72 * panel * count, _LETTERS) if title else []
    around = 0.4 * bars + 0.06 * len(arrays) + 0.3 + _TITLE * len(heading)
    figure = NotebookFigure(
        figsize=(panel * count, sum(tall) + around),
        layout=ConstrainedLayoutEngine(compress=True, h_pad=0.06),
    )
    panels = figure.subplots(len(arrays), count, squeeze=False, height_ratios=tall)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    if heading:
        figure.suptitle("\n".join(heading), fontsize=_LETTERS, parse_math=False)
    for axes, name in zip(panels[0, 1:], titles, strict=True):
        axes.set_title(_wrapped(name, panel, 10), fontsize=10, parse_math=False)
    for axes, name, height in zip(panels[:, 0], names, tall, strict=False):  # names may be empty
        axes.set_ylabel(_wrapped(name, height, 9), fontsize=9, parse_math=False)
    return figure, panels


def _wrapped(text: str, room: float, size: float) -> str:
    """Break a text into lines that leave a margin in `room` inches, next to their neighbours."""
    return "\n".join(title_lines(text, 0.9 * 72 * room, size))
