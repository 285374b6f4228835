"""The figure of an image and texts: which image regions and words make a text match it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_image,
    scale_bar,
    show_image,
    show_map,
)
from captum_generic_attn.visualization.scales import OWN, scales_of
from captum_generic_attn.visualization.texts import values_of
from captum_generic_attn.visualization.titles import checked_titles, title_lines
from captum_generic_attn.visualization.words import LINE, Word, draw_lines, set_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.visualization.scales import Scale

# Lengths are in inches, unless noted.
_PANEL = 2.9
_GAP = 0.3  # between panels
_EDGE = 0.12
_TITLE, _FURTHER = 0.28, 0.19  # a title of one line, and each further line
_LETTERS = 10  # font size of titles, in points
_BAR = 0.34  # a colour bar with its numbers and the space above it
_BAR_ITSELF = 0.09


def pairs_figure(
    image: ArrayLike | Image,
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    texts: Sequence[Sequence[Word]],
    titles: Sequence[str],
    *,
    title: str = "",
    crop_box: ArrayLike | None = None,
    shared_scale: bool = False,
) -> NotebookFigure:
    """A figure with the image, and for each text an overlay above its coloured words.

    Each map and each text has its own scale, shown by the colour bar under it: the relevance of
    words and of image regions is not on the same scale. Red marks evidence for the score; blue,
    where values are negative, evidence against it.

    Args:
        image: an image, as for `overlay`.
        heatmaps: at least one heat map, as for `overlay`: `[T, H, W]` or `[T, C, H, W]`.
        texts: the words of one text per heat map. A word is a sequence of (text, relevance), one
            for each piece into which the tokenizer splits it.
        titles: one per heat map.
        title: title over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.
        shared_scale: one scale for all maps, and one for all texts.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: there is no heat map, there is not one text and one title for each, a text has
            no words, or shapes or values do not fit.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import pairs_figure
        >>> text = [[("two", 0.1)], [("cat", 0.9), ("s", 0.3)]]
        >>> figure = pairs_figure(np.zeros((8, 8)), [np.eye(8)], [text], ["logit 3.2"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'logit 3.2']
        >>> [word.get_text() for word in figure.axes[3].texts]
        ['two', 'cat', 's']
    """
    if len(heatmaps) == 0:
        raise ValueError("there is no heat map to draw")
    names = checked_titles(titles, len(heatmaps))
    if len(heatmaps) != len(texts):
        raise ValueError(f"{len(heatmaps)} heat maps need as many texts, not {len(texts)}")
    array = checked_image(image)
    heats = [checked_heat(heatmap) for heatmap in heatmaps]
    map_scales = scales_of(heats, shared=shared_scale)
    values = [values_of(words, name) for words, name in zip(texts, names, strict=True)]
    text_scales = scales_of(values, shared=shared_scale)
    lines = [set_lines(words, 72 * _PANEL) for words in texts]
    rows = -(-(len(texts) + 1) // 4)
    columns = -(-(len(texts) + 1) // rows)
    broken = [title_lines(name, 72 * _PANEL, _LETTERS) for name in (title, *names)]
    tall = _PANEL * array.shape[0] / array.shape[1]
    counts = [0, *map(len, lines)]  # the panel of the image has no words
    # A row is high enough for its longest title and text.
    in_rows = [slice(row * columns, (row + 1) * columns) for row in range(rows)]
    above = [_TITLE + _FURTHER * (max(map(len, broken[row])) - 1) for row in in_rows]
    heights = [
        title_room + tall + _BAR + LINE / 72 * max(counts[row]) + _BAR + _GAP
        for title_room, row in zip(above, in_rows, strict=True)
    ]
    size = columns * (_PANEL + _GAP) - _GAP + 2 * _EDGE, sum(heights) - _GAP + 2 * _EDGE
    figure = NotebookFigure(figsize=size)

    def axes_at(place: int, below: float, high: float) -> Axes:
        """Axes as wide as a panel, `below` inches under the panel's title."""
        row, column = divmod(place, columns)
        left = _EDGE + column * (_PANEL + _GAP)
        top = _EDGE + sum(heights[:row]) + above[row] + below
        return figure.add_axes(
            (left / size[0], 1 - (top + high) / size[1], _PANEL / size[0], high / size[1])
        )

    def titled(place: int) -> Axes:
        axes = axes_at(place, 0, tall)
        axes.set_axis_off()
        axes.set_title("\n".join(broken[place]), fontsize=_LETTERS, parse_math=False)
        return axes

    def bar(place: int, below: float, scale: Scale, sharing: str) -> None:
        axes = axes_at(place, below, _BAR_ITSELF)
        extent = f"one scale for all {sharing}" if shared_scale else OWN
        scale_bar(figure, axes, scale, "relevance", extent, fill=True)

    show_image(titled(0), array)
    for place, own in enumerate(lines, 1):
        of_map, of_text = map_scales[place - 1], text_scales[place - 1]
        show_map(titled(place), array, heats[place - 1], of_map, crop_box)
        bar(place, tall + 0.06, of_map, "maps")
        below, high = tall + _BAR, LINE / 72 * len(own)
        words = axes_at(place, below, high)
        draw_lines(words, own, 72 * _PANEL, of_text.maximum, signed=of_text.signed)
        bar(place, below + high + 0.06, of_text, "texts")
    return figure
