"""Figures of an image and heat maps over it: of several scores, or of several methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_image,
    scale_bar,
    show_image,
    show_map,
)
from captum_generic_attn.visualization.scales import ONE, OWN, darkest, scale_of, scales_of
from captum_generic_attn.visualization.titles import checked_titles, title_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.comparison import Attributions, Comparison

_PANEL = 2.6  # how wide a panel is, in inches
_LETTERS = 11  # of titles, in points


def heatmap_figure(
    image: ArrayLike | Image,
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    titles: Sequence[str] | None = None,
    *,
    title: str = "",
    crop_box: ArrayLike | None = None,
    shared_scale: bool = False,
) -> NotebookFigure:
    """A figure with the image and one overlay per heat map, each over the bar of its scale.

    By default each map has its own scale, since one class often gets many times the relevance of
    another: the colours say where, the bars' numbers how much. The bars name the scale. Red speaks
    for the score; blue, where values are negative, against it.

    Args:
        image: as `overlay` takes it.
        heatmaps: at least one, as `overlay` takes them: `[T, H, W]`, or what `attribute_targets`
            returns of one image, `[T, C, H, W]`.
        titles: one per heat map; a single one needs none.
        title: stands over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.
        shared_scale: one scale for all, so that colours can be compared from map to map.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: no heat map, not one title for each, or shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import heatmap_figure
        >>> left, right = np.eye(8), np.eye(8)[::-1]
        >>> figure = heatmap_figure(np.zeros((8, 8)), [left, right], ["left", "right"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['', 'left', 'right']
    """
    if len(heatmaps) == 0:
        raise ValueError("there is no heat map to draw")
    names = _names(heatmaps, titles)
    array = checked_image(image)
    heats = [checked_heat(heatmap) for heatmap in heatmaps]
    scales = scales_of(heats, shared=shared_scale)
    figure, panels = panels_of(array, names, title)
    for axes, heat, scale in zip(panels, heats, scales, strict=True):
        show_map(axes, array, heat, scale, crop_box)
        scale_bar(figure, axes, scale, "relevance", ONE if shared_scale else OWN)
    return figure


def comparison_figure(
    image: ArrayLike | Image,
    comparison: Comparison,
    *,
    example: int = 0,
    part: int = 0,
    title: str = "",
    crop_box: ArrayLike | None = None,
) -> NotebookFigure:
    r"""A figure with the image and one overlay for each method of a comparison.

    Each has its own scale: methods have different units. Channels are summed, unless they are all
    alike. Red speaks for the score; blue, in methods that tell, against it. The darkest colours
    stand for the 99.5th percentile of a map's magnitudes, so that single pixels hide nothing.

    Args:
        image: as `overlay` takes it: the image of that example.
        comparison: what `compare` returned, of images `[B, C, H, W]`.
        example: which of the batch.
        part: which input holds the images, where there are several.
        title: stands over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.

    Raises:
        ValueError: if nothing of the comparison can be drawn, or it is of no images.

    Example:
        >>> import torch
        >>> from captum_generic_attn.comparison import Comparison
        >>> from captum_generic_attn.visualization import comparison_figure
        >>> found = Comparison({"ours": torch.rand(1, 3, 8, 8)}, {"ours": 0.25}, {}, {})
        >>> figure = comparison_figure(np.zeros((8, 8)), found)
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'ours\n0.25 s']
    """
    if not comparison.attributions:
        raise ValueError("no method of this comparison could be run: there is nothing to draw")
    array = checked_image(image)
    took = {name: f"\n{seconds:.2g} s" for name, seconds in comparison.seconds.items()}
    titles = [name + took.get(name, "") for name in comparison.attributions]
    figure, panels = panels_of(array, titles, title)
    for axes, (name, found) in zip(panels, comparison.attributions.items(), strict=True):
        heat = _one_map(found, example, part, name)
        scale = scale_of([heat], darkest)
        show_map(axes, array, heat, scale, crop_box)
        scale_bar(figure, axes, scale, "attribution", OWN)
    return figure


def panels_of(
    array: NDArray[np.float64], titles: Sequence[str], title: str
) -> tuple[NotebookFigure, list[Axes]]:
    """A figure that begins with the image, and panels for what is said of it, empty but for their
    titles, which are broken into lines.

    Args:
        array: the image, `[H, W]` or `[H, W, 3]` in 0 … 1.
        titles: of the panels, at least one.
        title: stands over the image.
    """
    rows = -(-(len(titles) + 1) // 4)
    columns = -(-(len(titles) + 1) // rows)
    broken = [title_lines(each, 72 * _PANEL, _LETTERS) for each in (title, *titles)]
    # What a panel needs above and below an image.
    around = 0.56 + 0.19 * max(map(len, broken))
    height = _PANEL * array.shape[0] / array.shape[1] + around
    layout = ConstrainedLayoutEngine(compress=True, h_pad=0.08)
    figure = NotebookFigure(figsize=(_PANEL * columns, height * rows), layout=layout)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid:
        axes.set_axis_off()
    for axes, lines in zip(grid, broken, strict=False):  # the last row may have room left
        axes.set_title("\n".join(lines), fontsize=_LETTERS, parse_math=False)
    show_image(grid[0], array)
    return figure, grid[1 : len(titles) + 1]


def _names(
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]], titles: Sequence[str] | None
) -> list[str]:
    """The titles of the maps."""
    if titles is None and len(heatmaps) == 1:
        return [""]
    try:
        return checked_titles([] if titles is None else titles, len(heatmaps))
    except ValueError as error:
        if getattr(heatmaps, "ndim", 0) != 3:
            raise
        raise ValueError(f"{error}; are they the channels of one image? give [map]") from None


def _one_map(found: Attributions, example: int, part: int, name: str) -> NDArray[np.float64]:
    """`[H, W]` of one example."""
    tensor = found[part] if isinstance(found, tuple) else found
    if tensor.ndim != 4:
        raise ValueError(f"{name} has attributions {tuple(tensor.shape)}; images are [B, C, H, W]")
    return checked_heat(tensor[example])
