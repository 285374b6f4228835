"""Figures of an image with heat maps over it, for several scores or several methods."""

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

_PANEL = 2.6  # width of a panel, in inches
_LETTERS = 11  # font size of titles, in points


def heatmap_figure(
    image: ArrayLike | Image,
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    titles: Sequence[str] | None = None,
    *,
    title: str = "",
    crop_box: ArrayLike | None = None,
    shared_scale: bool = False,
) -> NotebookFigure:
    """A figure with the image and one overlay per heat map, each with its colour bar.

    By default each map has its own scale, since one class often gets many times the relevance of
    another: colours show where, the numbers at the colour bars show how much. The bars also say
    whether the scale is shared. Red marks evidence for the score; blue, where values are negative,
    evidence against it.

    Args:
        image: an image, as for `overlay`.
        heatmaps: at least one heat map, as for `overlay`: `[T, H, W]`, or what `attribute_targets`
            returns for one image, `[T, C, H, W]`.
        titles: one per heat map; a single heat map needs none.
        title: title over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.
        shared_scale: one scale for all maps, so that their colours can be compared.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: there is no heat map, there is not one title for each, or shapes do not fit.

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

    Each map has its own scale, since methods have different units. Channels are summed, unless they
    are all equal. Red marks evidence for the score; blue, in signed methods, evidence against it.
    The darkest colours stand for the 99.5th percentile of a map's magnitudes, so that outlier
    pixels do not hide the rest.

    Args:
        image: the image of that example, as for `overlay`.
        comparison: what `compare` returned for images `[B, C, H, W]`.
        example: index in the batch.
        part: index of the input that holds the images, where there are several.
        title: title over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.

    Raises:
        ValueError: if the comparison has no attributions, or is not of images.

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
    """A figure with the image in its first panel, and further panels that are empty except for
    their titles.

    Args:
        array: the image, `[H, W]` or `[H, W, 3]` in 0 … 1.
        titles: the titles of the panels, at least one; they are broken into lines.
        title: title over the image.
    """
    rows = -(-(len(titles) + 1) // 4)
    columns = -(-(len(titles) + 1) // rows)
    broken = [title_lines(each, 72 * _PANEL, _LETTERS) for each in (title, *titles)]
    # The height that a panel needs above and below an image.
    around = 0.56 + 0.19 * max(map(len, broken))
    height = _PANEL * array.shape[0] / array.shape[1] + around
    layout = ConstrainedLayoutEngine(compress=True, h_pad=0.08)
    figure = NotebookFigure(figsize=(_PANEL * columns, height * rows), layout=layout)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid:
        axes.set_axis_off()
    for axes, lines in zip(grid, broken, strict=False):  # the last row may have unused panels
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
        raise ValueError(f"{error}; for the channels of a single map, give [map]") from None


def _one_map(found: Attributions, example: int, part: int, name: str) -> NDArray[np.float64]:
    """The map of one example, `[H, W]`."""
    tensor = found[part] if isinstance(found, tuple) else found
    if tensor.ndim != 4:
        raise ValueError(f"{name} has attributions {tuple(tensor.shape)}; images are [B, C, H, W]")
    return checked_heat(tensor[example])
